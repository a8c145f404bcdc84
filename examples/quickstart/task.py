"""Three-digit addition with a worked scratchpad in two styles: problems, training rows, judge and scores.

    long    078+345=  8+5+0=3c1;7+4+1=2c1;0+3+1=4c0>423      every column spelled out: digit+digit+carry
    short   078+345=  850=3c1;741=2c1;031=4c0>423            the same without the plus signs

Columns go from the ones upwards; `3c1` means "write 3, carry 1"; the answer follows `>`.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from examples import styles
from examples.styles import LONG, SHORT

CHARACTERS = "0123456789+=;c>"
MAX_NEW_TOKENS = 40  # the longest right answer has 34 characters and the end-of-text token
COLUMNS = {LONG: re.compile(r"\d\+\d\+\d=\dc\d"), SHORT: re.compile(r"\d{3}=\dc\d")}


@dataclass(frozen=True)
class Problem:
    """An addition of two numbers, written with `digits` digits each."""

    first: int
    second: int
    digits: int = 3

    @property
    def prompt(self) -> str:
        return f"{self.first:0{self.digits}d}+{self.second:0{self.digits}d}="

    @property
    def answer(self) -> str:
        return str(self.first + self.second)

    @classmethod
    def from_prompt(cls, prompt: str) -> "Problem":
        first, second = prompt.rstrip("=").split("+")
        return cls(int(first), int(second), len(first))


def draw_problems(counts: Sequence[int], seed: int, digits: int = 3) -> list[list[Problem]]:
    """Returns lists of `counts` problems; no problem occurs twice, within a list or across lists."""
    codes = random.Random(f"problems {seed}").sample(range(10 ** (2 * digits)), sum(counts))
    drawn = (Problem(code // 10**digits, code % 10**digits, digits) for code in codes)
    return [[next(drawn) for _ in range(count)] for count in counts]


def solution(problem: Problem, style: str) -> str:
    """Returns the worked answer in one of the two styles."""
    columns, carry = [], 0
    for column in range(problem.digits):
        first, second = (number // 10**column % 10 for number in (problem.first, problem.second))
        total = first + second + carry
        columns.append(f"{first}+{second}+{carry}={total % 10}c{total // 10}")
        carry = total // 10
    worked = ";".join(columns) + ">" + problem.answer
    return worked if style == LONG else worked.replace("+", "")


def style_of(problem: Problem, response: str, finished: bool) -> str | None:
    """Returns the style of a response, or None if it is malformed or did not end."""
    worked, found, answer = response.partition(">")
    columns = worked.split(";")
    if not (finished and found and answer.isdecimal() and len(columns) == problem.digits):
        return None
    return next((style for style, form in COLUMNS.items() if all(map(form.fullmatch, columns))), None)


def is_right(problem: Problem, response: str, finished: bool) -> bool:
    """Returns whether the response ends in the right sum."""
    return finished and response.endswith(">" + problem.answer)


def verdict(prompt: str, response: str, finished: bool) -> tuple[str | None, bool]:
    """Returns the style of a response, and whether it is right."""
    problem = Problem.from_prompt(prompt)
    return style_of(problem, response, finished), is_right(problem, response, finished)


sft_rows = partial(styles.sft_rows, solution)
preference_pairs = partial(styles.preference_pairs, verdict)
score = partial(styles.score, verdict)
write_model = partial(styles.write_model, CHARACTERS)
