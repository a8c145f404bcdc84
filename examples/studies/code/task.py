"""Compiles formulas for the stack machine of machine.py in two styles: problems, training rows, judge and scores.

    prompt  ((x+3)*y)-(2*x)=
    long    x3+Aay*B2x*Cbc-    every intermediate result is stored in a register and pushed again
    short   x3+y*2x*-          the values stay on the stack

An answer is right if its program, run on inputs that no prompt shows, gives the value of the formula. It is short if it
has no more instructions than the formula has numbers, inputs and operators, and long otherwise.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from examples import styles
from examples.studies.code.machine import DIGITS, INPUTS, OPERATORS, REGISTERS, Fault, run
from examples.styles import LONG, SHORT

LEAVES = 5  # numbers and inputs of a formula
CHARACTERS = DIGITS + INPUTS + "".join(OPERATORS) + REGISTERS + REGISTERS.upper() + "()="
MAX_NEW_TOKENS = 20  # the longest worked answer has 15 instructions and the end-of-text token
HIDDEN = tuple({"x": x, "y": y} for x, y in ((17, -23), (-8, 31), (57, 12), (-41, -66)))
Tree = str | tuple["Tree", str, "Tree"]
"""A number or an input, or (left, operator, right)."""


@dataclass(frozen=True)
class Problem:
    """A formula of x and y, with parentheses around every inner operation."""

    formula: str

    @property
    def prompt(self) -> str:
        return self.formula + "="

    @classmethod
    def from_prompt(cls, prompt: str) -> "Problem":
        return cls(prompt.removesuffix("="))


def draw_problems(counts: Sequence[int], seed: int) -> list[list[Problem]]:
    """Returns lists of `counts` problems; no problem occurs twice, within a list or across lists."""
    source = random.Random(f"formulas {seed}")
    drawn: dict[Problem, None] = {}
    while len(drawn) < sum(counts):
        formula = text(_draw(source, LEAVES))[1:-1]
        if all(name in formula for name in INPUTS):
            drawn[Problem(formula)] = None
    left = iter(drawn)
    return [[next(left) for _ in range(count)] for count in counts]


def _draw(source: random.Random, leaves: int) -> Tree:
    if leaves == 1:
        return source.choice((*INPUTS, source.choice(DIGITS[1:])))
    left = source.randint(1, leaves - 1)
    return _draw(source, left), source.choice(tuple(OPERATORS)), _draw(source, leaves - left)


def text(tree: Tree) -> str:
    """Returns the formula, with parentheses around every operation, including the outermost."""
    return tree if isinstance(tree, str) else f"({text(tree[0])}{tree[1]}{text(tree[2])})"


def parse(formula: str) -> Tree:
    """Returns the tree of a problem's formula."""
    characters = iter(f"({formula})")

    def node() -> Tree:
        if (first := next(characters)) != "(":
            return first
        found = (node(), next(characters), node())
        next(characters)  # the closing parenthesis
        return found

    return node()


def value(tree: Tree, inputs: dict[str, int]) -> int:
    """Returns the value of a formula, computed without the stack machine."""
    if isinstance(tree, str):
        return inputs[tree] if tree in inputs else int(tree)
    left, operator, right = tree
    return OPERATORS[operator](value(left, inputs), value(right, inputs))


def solution(problem: Problem, style: str) -> str:
    """Returns a right program in one of the two styles."""
    tree = parse(problem.formula)
    return _stacked(tree) if style == SHORT else _stored(tree)


def _stacked(tree: Tree) -> str:
    return tree if isinstance(tree, str) else _stacked(tree[0]) + _stacked(tree[2]) + tree[1]


def _stored(tree: Tree) -> str:
    registers = iter(REGISTERS)
    code = []

    def operand(node: Tree) -> str:
        if isinstance(node, str):
            return node
        code.append(operand(node[0]) + operand(node[2]) + node[1])
        register = next(registers)
        code.append(register.upper())
        return register

    operand(tree)
    return "".join(code[:-1])  # the result stays on the stack


def verdict(prompt: str, response: str, finished: bool) -> tuple[str | None, bool]:
    """Returns the style of a program (None if it faults or did not end), and whether it is right."""
    if not finished:
        return None, False
    tree = parse(Problem.from_prompt(prompt).formula)
    try:
        outputs = [run(response, inputs) for inputs in HIDDEN]
    except Fault:
        return None, False
    style = SHORT if len(response) < 2 * LEAVES else LONG
    return style, outputs == [value(tree, inputs) for inputs in HIDDEN]


sft_rows = partial(styles.sft_rows, solution)
preference_pairs = partial(styles.preference_pairs, verdict)
score = partial(styles.score, verdict)
write_model = partial(styles.write_model, CHARACTERS)
