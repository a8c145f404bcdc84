"""Converts rows to token ids: chat template, end-of-turn token, border between prompt and response, truncation.

In every tokenised row, the prompt tokens are a prefix of prompt + response, a begin-of-sequence token occurs at most
once and only at the start, and a response ends with exactly one end-of-turn token (unless `truncation: right` cuts it).
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

from megatron_spo.data import hub
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
"""Prefixes after which a text is tokenised to find its tokens as a continuation of another text."""

MARK = "\u2603"
"""A placeholder answer, to find what the template writes after an answer."""


class Overlong(RowProblem):
    """A row that exceeds `data.max_length` or `data.row_length` even after truncation."""


def load_tokenizer(path: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a model folder or hub id. The file `chat_template` replaces its chat template.

    Raises:
        UserError: there is no usable tokenizer, or the template cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(path)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        # transformers 5 would create an empty tokenizer of the model's family
        raise UserError(f"{path} contains no tokenizer ({', '.join(TOKENIZER_FILES)}); set model.tokenizer")
    if not folder.is_dir():
        folder = hub.download(path, "model.tokenizer", hub.SMALL_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # loaders can raise any exception
        first = str(error).strip().splitlines()[:1]
        raise UserError(f"cannot load a tokenizer from {path}: {''.join(first)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer of {path} has no fast version (tokenizer.json); convert it to one first")
    if chat_template is not None:
        file = Path(chat_template)
        if not file.is_file():
            raise UserError(f"data.chat_template: file {chat_template} does not exist")
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"data.chat_template: file {chat_template} is not UTF-8 text") from error
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns a hex digest of everything that determines tokens: tokenizer, special tokens and chat template."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    rest = json.dumps([special, tokenizer.chat_template], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(backend.to_str().encode() + rest.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class LengthLimits:
    """Length limits of a row.

    Attributes:
        max_length: maximum tokens of prompt + response, for each response.
        truncation: what to cut from longer rows: "left" (start of the prompt), "right" (end of the response) or None.
        row_length: maximum tokens of the packed pair.
    """

    max_length: int
    truncation: str | None
    row_length: int


NO_LIMITS = LengthLimits(sys.maxsize, None, sys.maxsize)


class RowTokenizer:
    """Tokenises validated rows.

    Methods raise RowProblem for an unusable row, and UserError if the tokenizer is not usable for any row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, limits: LengthLimits = NO_LIMITS) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        self._backend.no_truncation()  # a limit in tokenizer.json would truncate rows silently
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
        """Returns the token ids of `text` without added special tokens."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def prompt_ids(self, pair: Pair) -> list[int]:
        """Returns the token ids of the prompt of a pair, the same as in `tokenize` before truncation."""
        return self._prompt_ids(*self._start(self.with_prompt(pair)))

    def with_prompt(self, pair: Pair) -> Pair:
        """Returns the pair with an explicit prompt: an implicit prompt is moved out of the responses."""
        if pair.prompt is not None:
            return pair
        assert isinstance(pair.chosen, str) and isinstance(pair.rejected, str)
        cut = self._common_text(pair.chosen, pair.rejected)
        for answer, field in ((pair.chosen, pair.answer_field), (pair.rejected, "rejected")):
            if not answer[cut:].strip():
                raise RowProblem(field, "is empty after the common start of 'chosen' and 'rejected'")
        return replace(pair, prompt=pair.chosen[:cut], chosen=pair.chosen[cut:], rejected=pair.rejected[cut:])

    def tokenize(self, pair: Pair) -> Example:
        """Returns the token ids of one row within the length limits."""
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
        """Returns the prompt as text, and the token ids to put before it (begin-of-sequence; none with a chat template,
        which writes them itself)."""
        if isinstance(pair.prompt, str):
            return pair.prompt, self._lead
        assert pair.prompt is not None
        if self._template is None:
            raise UserError(
                "the rows are lists of messages, but the tokenizer has no chat template; "
                "set data.chat_template to a template file"
            )
        return self._template.render(pair.prompt, pair.template, "prompt", generation=True), ()

    def _prompt_ids(self, start: str, lead: tuple[int, ...]) -> list[int]:
        ids = _single_start([*lead, *self.encode(start)], self._tokenizer.bos_token_id)
        if not ids:
            raise RowProblem("prompt", "is empty; there must be at least one token before the response")
        return ids

    def _find_lead(self) -> tuple[int, ...]:
        """Returns the token ids that the tokenizer adds before a text."""
        plain, full = self.encode(PROBE), list(self._backend.encode(PROBE).ids)
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return tuple(full[:start])
        return ()

    def _find_added_space(self) -> bool:
        """Returns whether the tokenizer adds a space before a text (sentencepiece)."""
        for joiner in JOINERS:
            head, both = self.encode(joiner), self.encode(joiner + PROBE)
            if both[: len(head)] == head:
                return both[len(head) :] != self.encode(PROBE)
        return False

    def _continuation(self, text: str) -> list[int]:
        """Returns the token ids of `text` as a continuation of another text, without merges across the border."""
        for joiner in JOINERS if self._adds_space else ():
            head, both = self.encode(joiner), self.encode(joiner + text)
            if both[: len(head)] == head:
                return both[len(head) :]
        return self.encode(text)

    def _answers(self, pair: Pair, start: str) -> Iterator[tuple[str, int | None, str]]:
        """Yields (text, end token id, field) for each response. The end token id is None if the text already ends with
        the end-of-turn token of the template."""
        fields = (pair.answer_field,) if pair.rejected is None else (pair.answer_field, "rejected")
        eos = self._tokenizer.eos_token_id
        for answer, field in zip((pair.chosen, pair.rejected), fields, strict=False):
            assert answer is not None
            if isinstance(answer, str):
                if eos is None:
                    raise UserError(
                        "the tokenizer has no eos_token, which must end the responses of rows with strings; "
                        "set model.tokenizer"
                    )
                yield answer, eos, field
                continue
            text, ended = self._rendered(pair, answer, start, field)
            if not ended and eos is None:
                raise UserError(
                    "the chat template ends a turn without a special token, and the tokenizer has no eos_token; set "
                    "data.chat_template or model.tokenizer"
                )
            yield text, None if ended else eos, field

    def _common_text(self, chosen: str, rejected: str) -> int:
        """Returns the length of the implicit prompt in characters: the longest common start that ends at a token border
        of both texts and not inside a word. A space before the responses belongs to the responses."""
        limit = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        limit = min(len(chosen), len(rejected)) if limit is None else limit
        borders = self._borders(chosen) & self._borders(rejected)
        for cut in range(limit, 0, -1):
            inside = chosen[cut - 1].isalnum() and any(text[cut : cut + 1].isalnum() for text in (chosen, rejected))
            if cut in borders and not inside and chosen[cut - 1] != " " and chosen[:cut].strip():
                return cut
        raise RowProblem("prompt", "is missing, and 'chosen' and 'rejected' have no common start to use as the prompt")

    def _borders(self, text: str) -> set[int]:
        spans = self._backend.encode(text, add_special_tokens=False).offsets
        inside = {position for start, end in spans for position in range(start + 1, end)}
        return {end for _, end in spans} - inside

    def _rendered(self, pair: Pair, answer: list[Message], start: str, field: str) -> tuple[str, bool]:
        """Returns the rendered answer after the prompt `start`, up to its end-of-turn token, and whether there is such
        a token. Text after the token (a newline, an end-of-text) is not generated by the model and is not part of the
        response."""
        assert isinstance(pair.prompt, list) and self._template is not None
        full = self._template.render(pair.prompt + answer, pair.template, field, generation=False)
        if not full.startswith(start):
            at = next((i for i, (a, b) in enumerate(zip(start, full, strict=False)) if a != b), len(full))
            here, there = start[at : at + 20], full[at : at + 20]
            raise RowProblem(
                field,
                "the chat template renders the prompt differently if an answer follows (from character "
                f"{at + 1}: {here!r} instead of {there!r}); set data.chat_template to one that does not",
            )
        rendered = full[len(start) :]
        if answer[-1].get("tool_calls"):
            ended = rendered.removesuffix(self._after_turn(pair, answer, field))
            if any(ended.endswith(token) for token in self._specials):
                return ended, True
        return self._end_of_turn(rendered, answer[-1].get("content", ""))

    def _after_turn(self, pair: Pair, answer: list[Message], field: str) -> str:
        """Returns the text that the template writes after the token that ends an answer, found with a placeholder
        answer that contains no special tokens."""
        assert isinstance(pair.prompt, list) and self._template is not None
        plain = [*pair.prompt, *answer[:-1], {"role": "assistant", "content": MARK}]
        try:
            text = self._template.render(plain, pair.template, field, generation=False)
        except RowProblem:  # the template supports only tool calls
            return ""
        end = self._special.search(text, text.rfind(MARK) + len(MARK))
        return text[end.end() :] if end else ""

    def _end_of_turn(self, rendered: str, content: str) -> tuple[str, bool]:
        """Returns a rendered answer of `content` up to its end-of-turn token, and whether there is one."""
        start = self._ending(rendered)
        content = content.rstrip()
        own = content[self._ending(content) :]  # special tokens at the end of the content
        if own and rendered.startswith(own, start) and self._special.search(rendered, start + len(own)):
            start += len(own)
        match = self._special.search(rendered, start)
        return (rendered[: match.end()], True) if match else (rendered, False)

    def _ending(self, text: str) -> int:
        """Returns the start of the special tokens and white space at the end of a text."""
        end = len(text)
        while True:
            rest = text[:end].rstrip()
            token = next((token for token in self._specials if rest.endswith(token)), None)
            if token is None:
                return end
            end = len(rest) - len(token)

    def _fit(self, prompt: list[int], sides: list[list[int]], fields: list[str]) -> Example:
        """Applies `truncation` and checks both length limits."""
        limit = self._limits.max_length
        if self._limits.truncation == "left":
            excess = max(len(prompt) + max(len(side) for side in sides) - limit, 0)
            kept = self._kept_of(prompt)  # keeps at least the last token
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
        """Returns the number of leading prompt tokens that are never cut: those that the tokenizer adds, such as
        begin-of-sequence."""
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
    """Returns `ids` without repetitions of a leading `token`."""
    while token is not None and ids[:2] == [token, token]:
        ids = ids[1:]
    return ids


def _end_once(response: list[int], end: int | None, field: str) -> list[int]:
    """Returns `response` with exactly one `end` token at its end (None: its present last token)."""
    body = list(response)
    last = end if end is not None or not body else body[-1]
    while body and body[-1] == last:
        body.pop()
    if not body or last is None:
        raise RowProblem(field, "is empty after tokenisation")
    return [*body, last]
