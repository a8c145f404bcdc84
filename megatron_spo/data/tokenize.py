"""Rows to token ids: chat template, end-of-turn, the border between prompt and answer, truncation.

Invariants of every tokenised row: prompt tokens are a prefix of prompt + response (never made so by
slicing), a begin-of-sequence token stands at most once and only at the start, and a response ends in
exactly one end-of-turn token (unless `truncation: right` cut it off).
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_spo.data.chat_template import ChatTemplate
from megatron_spo.data.json_lines import RowProblem
from megatron_spo.data.pairs import Message, Pair
from megatron_spo.data.rows import Example
from megatron_spo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
PROBE = "a"
JOINERS = ("\n", ".", "a", "|")
"""After one of these a text is tokenised as the continuation of another."""

MARK = "\u2603"
"""An answer of which only the end matters."""


class Overlong(RowProblem):
    """A row that `data.max_length` or `data.row_length` does not admit and truncation cannot mend."""


def load_tokenizer(path: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder or hub id; `chat_template` names a file that replaces its template."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(path)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        # transformers 5 would make an empty tokenizer of the model's family
        raise UserError(f"{path} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); name its folder in model.tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises whatever its loaders raise
        first = str(error).strip().splitlines()[:1]
        raise UserError(f"no tokenizer can be loaded from {path}: {''.join(first)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer of {path} has no fast version (tokenizer.json); convert it first")
    if chat_template is not None:
        file = Path(chat_template)
        if not file.is_file():
            raise UserError(f"data.chat_template: file {chat_template} does not exist")
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"data.chat_template: {chat_template} is not a text file in UTF-8") from error
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hex digest of what decides a row's tokens: the tokenizer's content, special tokens and chat
    template."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    rest = json.dumps([special, tokenizer.chat_template], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(backend.to_str().encode() + rest.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class LengthLimits:
    """How long a row may be (tokens of prompt + response, each side; tokens of the packed pair), and the
    side that is cut when it is longer: "left" (the prompt's start), "right" (the response's end) or None
    (nothing)."""

    max_length: int
    truncation: str | None
    row_length: int


NO_LIMITS = LengthLimits(sys.maxsize, None, sys.maxsize)


class RowTokenizer:
    """Tokenises validated rows. UserError when the tokenizer cannot serve at all; RowProblem for a row."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, limits: LengthLimits = NO_LIMITS) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        self._backend.no_truncation()  # a limit stored in tokenizer.json would cut rows silently
        self._backend.no_padding()
        self._limits = limits
        self._lead = self._find_lead()
        self._adds_space = self._find_added_space()
        specials = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        specials |= {token for token in (tokenizer.eos_token,) if token}
        self._template = None if tokenizer.chat_template is None else ChatTemplate(tokenizer)
        self._specials = sorted(specials, key=lambda token: (-len(token), token))
        self._special = re.compile("|".join(re.escape(token) for token in self._specials) or r"(?!)")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone: nothing added before or after."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def prompt_ids(self, pair: Pair) -> list[int]:
        """Token ids of the prompt of a pair, as in the row that `tokenize` makes of it, before truncation."""
        return self._prompt_ids(*self._start(self.with_prompt(pair)))

    def with_prompt(self, pair: Pair) -> Pair:
        """The same pair, its implicit prompt cut off its answers where it has one."""
        if pair.prompt is not None:
            return pair
        assert isinstance(pair.chosen, str) and isinstance(pair.rejected, str)
        cut = self._common_text(pair.chosen, pair.rejected)
        for answer, field in ((pair.chosen, pair.answer_field), (pair.rejected, "rejected")):
            if not answer[cut:].strip():
                raise RowProblem(field, "is empty after the start that 'chosen' and 'rejected' have in common")
        return replace(pair, prompt=pair.chosen[:cut], chosen=pair.chosen[cut:], rejected=pair.rejected[cut:])

    def tokenize(self, pair: Pair) -> Example:
        """The token ids of one row within the length limits."""
        pair = self.with_prompt(pair)
        start, lead = self._start(pair)
        prompt, bare = self._prompt_ids(start, lead), self.encode(start)
        sides, fields = [], []
        for answer, end, field in self._answers(pair, start):
            joint = self.encode(start + answer)
            response = joint[len(bare) :] if joint[: len(bare)] == bare else self._continuation(answer)
            sides.append(_end_once(response, end, field))
            fields.append(field)
        return self._fit(prompt, sides, fields)

    def _start(self, pair: Pair) -> tuple[str, tuple[int, ...]]:
        """The prompt as text, and the token ids before it (begin-of-sequence), which a chat template would have written
        itself."""
        if isinstance(pair.prompt, str):
            return pair.prompt, self._lead
        assert pair.prompt is not None
        if self._template is None:
            raise UserError(
                "the rows are lists of messages and the tokenizer has no chat template; "
                "name a template file in data.chat_template"
            )
        return self._template.render(pair.prompt, pair.template, "prompt", generation=True), ()

    def _prompt_ids(self, start: str, lead: tuple[int, ...]) -> list[int]:
        ids = _single_start([*lead, *self.encode(start)], self._tokenizer.bos_token_id)
        if not ids:
            raise RowProblem("prompt", "is empty: there is no token from which the first response token is predicted")
        return ids

    def _find_lead(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text by itself (its end-of-sequence, if it adds one, is left
        off)."""
        plain, full = self.encode(PROBE), list(self._backend.encode(PROBE).ids)
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return tuple(full[:start])
        return ()

    def _find_added_space(self) -> bool:
        """Whether a text that stands alone gets a space of its own (sentencepiece)."""
        for joiner in JOINERS:
            head, both = self.encode(joiner), self.encode(joiner + PROBE)
            if both[: len(head)] == head:
                return both[len(head) :] != self.encode(PROBE)
        return False

    def _continuation(self, text: str) -> list[int]:
        """Tokens of `text` as the continuation of another text, without merging across the border."""
        for joiner in JOINERS if self._adds_space else ():
            head, both = self.encode(joiner), self.encode(joiner + text)
            if both[: len(head)] == head:
                return both[len(head) :]
        return self.encode(text)

    def _answers(self, pair: Pair, start: str) -> Iterator[tuple[str, int | None, str]]:
        """Of each answer its text, with the end-of-turn token where that is text, the token id that must end it (None:
        its own last token is the template's end of turn), and its field."""
        fields = (pair.answer_field,) if pair.rejected is None else (pair.answer_field, "rejected")
        eos = self._tokenizer.eos_token_id
        for answer, field in zip((pair.chosen, pair.rejected), fields, strict=False):
            assert answer is not None
            if isinstance(answer, str):
                if eos is None:
                    raise UserError("the tokenizer has no eos_token, which has to end the responses of string rows")
                yield answer, eos, field
                continue
            text, ended = self._rendered(pair, answer, start, field)
            if not ended and eos is None:
                raise UserError(
                    "the chat template ends a turn without a special token and the tokenizer has no eos_token"
                )
            yield text, None if ended else eos, field

    def _common_text(self, chosen: str, rejected: str) -> int:
        """Characters of the implicit prompt: the longest common start that ends at a token border of both
        texts and not inside a word; a space before the answers belongs to them."""
        limit = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        limit = min(len(chosen), len(rejected)) if limit is None else limit
        borders = self._borders(chosen) & self._borders(rejected)
        for cut in range(limit, 0, -1):
            inside = chosen[cut - 1].isalnum() and any(text[cut : cut + 1].isalnum() for text in (chosen, rejected))
            if cut in borders and not inside and chosen[cut - 1] != " " and chosen[:cut].strip():
                return cut
        raise RowProblem("prompt", "is missing, and 'chosen' and 'rejected' have no common start to be the prompt")

    def _borders(self, text: str) -> set[int]:
        spans = self._backend.encode(text, add_special_tokens=False).offsets
        inside = {position for start, end in spans for position in range(start + 1, end)}
        return {end for _, end in spans} - inside

    def _rendered(self, pair: Pair, answer: list[Message], start: str, field: str) -> tuple[str, bool]:
        """The answer as the template writes it after the prompt `start`, up to its end-of-turn token, and whether the
        template wrote one. What follows the token (a newline, an end-of-text) is not generated by the model and not
        part of the response."""
        assert isinstance(pair.prompt, list) and self._template is not None
        full = self._template.render(pair.prompt + answer, pair.template, field, generation=False)
        if not full.startswith(start):
            at = next((i for i, (a, b) in enumerate(zip(start, full, strict=False)) if a != b), len(full))
            here, there = start[at : at + 20], full[at : at + 20]
            raise RowProblem(
                field,
                "the chat template renders the prompt differently once an answer follows (from character "
                f"{at + 1}: {here!r} against {there!r}); name one that does not in data.chat_template",
            )
        rendered = full[len(start) :]
        if answer[-1].get("tool_calls"):
            ended = rendered.removesuffix(self._after_turn(pair, answer, field))
            if any(ended.endswith(token) for token in self._specials):
                return ended, True
        return self._end_of_turn(rendered, answer[-1].get("content", ""))

    def _after_turn(self, pair: Pair, answer: list[Message], field: str) -> str:
        """What the template writes behind the token that ends an answer, seen where nothing in the answer itself can be
        taken for that token."""
        assert isinstance(pair.prompt, list) and self._template is not None
        plain = [*pair.prompt, *answer[:-1], {"role": "assistant", "content": MARK}]
        try:
            text = self._template.render(plain, pair.template, field, generation=False)
        except RowProblem:  # a template for tool calls alone
            return ""
        end = self._special.search(text, text.rfind(MARK) + len(MARK))
        return text[end.end() :] if end else ""

    def _end_of_turn(self, rendered: str, content: str) -> tuple[str, bool]:
        """A rendered answer of `content` up to its end-of-turn token, and whether there is one."""
        start = self._ending(rendered)
        content = content.rstrip()
        own = content[self._ending(content) :]  # special tokens with which the content itself ends
        if own and rendered.startswith(own, start) and self._special.search(rendered, start + len(own)):
            start += len(own)
        match = self._special.search(rendered, start)
        return (rendered[: match.end()], True) if match else (rendered, False)

    def _ending(self, text: str) -> int:
        """Where the special tokens and white space begin with which a text ends."""
        end = len(text)
        while True:
            rest = text[:end].rstrip()
            token = next((token for token in self._specials if rest.endswith(token)), None)
            if token is None:
                return end
            end = len(rest) - len(token)

    def _fit(self, prompt: list[int], sides: list[list[int]], fields: list[str]) -> Example:
        """Apply `truncation` and check both length limits."""
        limit = self._limits.max_length
        if self._limits.truncation == "left":
            excess = max(len(prompt) + max(len(side) for side in sides) - limit, 0)
            kept = self._kept_of(prompt)  # with the last token at least
            prompt = prompt[:kept] + prompt[max(min(kept + excess, len(prompt) - 1), kept) :]
        elif self._limits.truncation == "right":
            sides = [side[: max(limit - len(prompt), 1)] for side in sides]
        for side, field in zip(sides, fields, strict=True):
            if len(prompt) + len(side) > limit:
                raise Overlong(
                    field,
                    f"has {len(prompt) + len(side)} tokens with the prompt; data.max_length allows {limit}",
                )
        if len(sides) == 2 and sides[0] == sides[1]:
            cut = " and truncation" if self._limits.truncation == "right" else ""
            raise RowProblem("rejected", f"equals 'chosen' after tokenisation{cut}")
        return self._example(prompt, sides, fields)

    def _kept_of(self, prompt: list[int]) -> int:
        """How many tokens at the start of a prompt are no text and are never cut: begin-of-sequence, or whatever the
        tokenizer puts before a text."""
        if self._lead and prompt[: len(self._lead)] == list(self._lead):
            return len(self._lead)
        return int(prompt[0] == self._tokenizer.bos_token_id)

    def _example(self, prompt: list[int], sides: list[list[int]], fields: list[str]) -> Example:
        chosen = np.array(prompt + sides[0], dtype=np.int32)
        rejected = np.array(prompt + sides[1] if len(sides) == 2 else [], dtype=np.int32)
        shared = _common_length(chosen, rejected) if len(sides) == 2 else len(chosen)
        tokens = len(chosen) + max(len(rejected) - shared, 0)
        if tokens > self._limits.row_length:
            raise Overlong(
                fields[-1],
                f"the pair packs into {tokens} tokens; data.row_length allows {self._limits.row_length}",
            )
        return Example(chosen, rejected, len(prompt), shared)


def _common_length(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def _single_start(ids: list[int], token: int | None) -> list[int]:
    """`ids` without repetitions of a leading `token`."""
    while token is not None and ids[:2] == [token, token]:
        ids = ids[1:]
    return ids


def _end_once(response: list[int], end: int | None, field: str) -> list[int]:
    """`response` ending in exactly one `end` (None: whatever token it ends in now)."""
    body = list(response)
    last = end if end is not None or not body else body[-1]
    while body and body[-1] == last:
        body.pop()
    if not body or last is None:
        raise RowProblem(field, "is empty once tokenised")
    return [*body, last]
