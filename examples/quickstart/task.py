"""Three-digit addition with a worked scratchpad in two styles: problems, training rows, judge and scores.

    long    078+345=  8+5+0=3c1;7+4+1=2c1;0+3+1=4c0>423      every column spelled out: digit+digit+carry
    short   078+345=  850=3c1;741=2c1;031=4c0>423            the same without the plus signs

Columns run from the ones to the hundreds; `3c1` reads "write 3, carry 1"; the answer follows `>`.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import LlamaConfig, PreTrainedTokenizerFast

CHARACTERS = "0123456789+=;c>"
LONG, SHORT = "long", "short"
PREFERRED = SHORT
MAX_NEW_TOKENS = 40  # the longest right answer has 34 characters and the end-of-text token
FORMS = {
    LONG: re.compile(r"(\d\+\d\+\d=\dc\d;){2}\d\+\d\+\d=\dc\d>\d+"),
    SHORT: re.compile(r"(\d{3}=\dc\d;){2}\d{3}=\dc\d>\d+"),
}


@dataclass(frozen=True)
class Problem:
    """Two numbers from 0 to 999."""

    first: int
    second: int

    @property
    def prompt(self) -> str:
        return f"{self.first:03d}+{self.second:03d}="

    @property
    def answer(self) -> str:
        return str(self.first + self.second)

    @classmethod
    def from_prompt(cls, prompt: str) -> "Problem":
        first, second = prompt.rstrip("=").split("+")
        return cls(int(first), int(second))


def draw_problems(counts: Sequence[int], seed: int) -> list[list[Problem]]:
    """Lists of `counts` problems each; no problem occurs twice, within a list or across lists."""
    codes = random.Random(f"problems {seed}").sample(range(10**6), sum(counts))
    drawn = iter(Problem(*divmod(code, 1000)) for code in codes)
    return [[next(drawn) for _ in range(count)] for count in counts]


def solution(problem: Problem, style: str) -> str:
    """The worked answer in one of the two styles."""
    columns, carry = [], 0
    for place in (1, 10, 100):
        first, second = problem.first // place % 10, problem.second // place % 10
        total = first + second + carry
        columns.append(f"{first}+{second}+{carry}={total % 10}c{total // 10}")
        carry = total // 10
    worked = ";".join(columns) + ">" + problem.answer
    return worked if style == LONG else worked.replace("+", "")


def sft_rows(problems: Iterable[Problem]) -> list[dict[str, str]]:
    """Every problem three times in the long style and twice in the short one: 60% to 40%."""
    styles = (LONG, LONG, LONG, SHORT, SHORT)
    return [{"prompt": p.prompt, "completion": solution(p, style)} for p in problems for style in styles]


def style_of(response: str, finished: bool) -> str | None:
    """The style of a response, None where it is malformed (or never ended)."""
    if not finished:
        return None
    return next((style for style, form in FORMS.items() if form.fullmatch(response)), None)


def is_right(problem: Problem, response: str, finished: bool) -> bool:
    """Whether the response ends in the right sum."""
    return finished and response.endswith(">" + problem.answer)


def preference_pairs(
    sampled: Iterable[dict[str, Any]], count: int, agreement: float, seed: int
) -> list[dict[str, str]]:
    """At most `count` pairs from sampled responses: both right, one in each style, one pair a problem.

    The judge likes the short style but is noisy: it takes the short one with probability `agreement`.
    """
    judge = random.Random(f"judge {seed}")
    pairs: list[dict[str, str]] = []
    for row in sampled:
        problem = Problem.from_prompt(row["prompt"])
        by_style: dict[str, str] = {}
        for response, finished in zip(row["responses"], row["finished"], strict=True):
            style = style_of(response, finished)
            if style is not None and is_right(problem, response, finished):
                by_style.setdefault(style, response)
        if len(by_style) < len(FORMS) or len(pairs) == count:
            continue
        chosen, rejected = (SHORT, LONG) if judge.random() < agreement else (LONG, SHORT)
        pairs.append({"prompt": row["prompt"], "chosen": by_style[chosen], "rejected": by_style[rejected]})
    return pairs


@dataclass(frozen=True)
class Score:
    """Shares of a set of responses, each from 0 to 1; `win` is right and in the preferred style at once."""

    accuracy: float
    malformed: float
    preferred: float
    win: float


def score(generated: Sequence[dict[str, Any]]) -> Score:
    """Scores every response of a file written by `megatron-spo generate`."""
    right, malformed, preferred, win, total = 0, 0, 0, 0, 0
    for row in generated:
        problem = Problem.from_prompt(row["prompt"])
        for response, finished in zip(row["responses"], row["finished"], strict=True):
            style, correct = style_of(response, finished), is_right(problem, response, finished)
            total += 1
            right += correct
            malformed += style is None
            preferred += style == PREFERRED
            win += correct and style == PREFERRED
    return Score(right / total, malformed / total, preferred / total, win / total)


def write_model(folder: Path) -> None:
    """An untrained Llama of 0.3M parameters: a config.json, from which `train` draws the weights, and a
    tokenizer with one token a character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    raw = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(vocabulary),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config.save_pretrained(folder)
