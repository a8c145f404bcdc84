"""Functions that the tasks with two styles of answer share: SFT rows, pairs by a noisy judge, scores, a small model.

A task is a module with the members of `Task`. Its verdict on a response is the response's style (None if it is
malformed or did not end) and whether it is right.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import LlamaConfig, PreTrainedTokenizerFast

LONG, SHORT = "long", "short"
PREFERRED = SHORT
Verdict = Callable[[str, str, bool], tuple[str | None, bool]]
"""(prompt, response, finished) -> (style, right)."""


@dataclass(frozen=True)
class Score:
    """Shares of a set of responses, each from 0 to 1; `win` is right and in the preferred style at once."""

    accuracy: float
    malformed: float
    preferred: float
    win: float


class Problem(Protocol):
    """A question of a task; equal problems have equal prompts."""

    @property
    def prompt(self) -> str: ...


class Task(Protocol):
    """A task as a module: problems, training rows, pairs, scores and the untrained model."""

    MAX_NEW_TOKENS: int

    def draw_problems(self, counts: Sequence[int], seed: int) -> Sequence[Sequence[Any]]: ...

    def sft_rows(self, problems: Iterable[Any]) -> list[dict[str, str]]: ...
    def preference_pairs(
        self, sampled: Iterable[dict[str, Any]], count: int, agreement: float, seed: int
    ) -> list[dict[str, str]]: ...
    def score(self, generated: Sequence[dict[str, Any]]) -> Score: ...
    def write_model(self, folder: Path) -> None: ...


def sft_rows(solution: Callable[[Any, str], str], problems: Iterable[Problem]) -> list[dict[str, str]]:
    """Returns every problem three times in the long style and twice in the short one (60% and 40%)."""
    styles = (LONG, LONG, LONG, SHORT, SHORT)
    return [{"prompt": p.prompt, "completion": solution(p, style)} for p in problems for style in styles]


def preference_pairs(
    verdict: Verdict, sampled: Iterable[dict[str, Any]], count: int, agreement: float, seed: int
) -> list[dict[str, str]]:
    """Returns at most `count` pairs of sampled responses: both right, one in each style, one pair per problem.

    The judge is noisy: it prefers the short style with probability `agreement`.
    """
    judge = random.Random(f"judge {seed}")
    pairs: list[dict[str, str]] = []
    for row in sampled:
        by_style: dict[str, str] = {}
        for response, finished in zip(row["responses"], row["finished"], strict=True):
            style, right = verdict(row["prompt"], response, finished)
            if style is not None and right:
                by_style.setdefault(style, response)
        if len(by_style) < 2 or len(pairs) == count:
            continue
        chosen, rejected = (SHORT, LONG) if judge.random() < agreement else (LONG, SHORT)
        pairs.append({"prompt": row["prompt"], "chosen": by_style[chosen], "rejected": by_style[rejected]})
    return pairs


def score(verdict: Verdict, generated: Sequence[dict[str, Any]]) -> Score:
    """Scores every response of a file written by `megatron-spo generate`."""
    verdicts = [
        verdict(row["prompt"], response, finished)
        for row in generated
        for response, finished in zip(row["responses"], row["finished"], strict=True)
    ]

    def share(of: Callable[[str | None, bool], bool]) -> float:
        return sum(of(style, right) for style, right in verdicts) / len(verdicts)

    return Score(
        accuracy=share(lambda style, right: right),
        malformed=share(lambda style, right: style is None),
        preferred=share(lambda style, right: style == PREFERRED),
        win=share(lambda style, right: right and style == PREFERRED),
    )


def write_model(characters: str, folder: Path) -> None:
    """Writes the config.json of a Llama of 0.3M parameters, and a tokenizer with one token per character.

    `train` draws the weights.
    """
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *characters])}
    raw = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    write_llama(tokenizer, folder, hidden_size=96, intermediate_size=256, max_position_embeddings=128)


def write_llama(tokenizer: PreTrainedTokenizerFast, folder: Path, **shape: Any) -> None:
    """Writes a tokenizer, and the config.json of a Llama of 3 layers with 4 heads for it."""
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **shape,
    )
    config.save_pretrained(folder)
