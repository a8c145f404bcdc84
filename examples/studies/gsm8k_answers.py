"""Scores sampled solutions of GSM8K, even if none is right: are the calculations in a solution right?

GSM8K's solutions show each calculation as <<48/2=24>>, which can be checked by itself.
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_spo.evaluate import scores

MAX_NEW_TOKENS = 256  # with a vocabulary of 1024; 96% of the chosen solutions are shorter
CALCULATION = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
ROUNDED = 0.01  # allowed rounding error of a result, relative or absolute
OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Score:
    """Scores of a set of solutions.

    Attributes:
        accuracy: Share of solutions that end with the right final answer.
        malformed: Share of solutions that did not end or give no number.
        calculations: Mean number of calculations in a solution.
        hold: Share of all calculations that are right.
        sound: Share of solutions that end, show at least one calculation, and show no wrong one.
        rep_4: Mean share of a solution's runs of 4 words that are repetitions.
    """

    accuracy: float
    malformed: float
    calculations: float
    hold: float
    sound: float
    rep_4: float


def score(generated: Sequence[dict[str, Any]]) -> Score:
    """Scores rows with `chosen` (a right solution), `responses` and `finished`, as written by `generate`."""
    responses = [row["responses"] for row in generated]
    finished = [row["finished"] for row in generated]
    found = scores.score(generated, responses, finished)
    shown = [[holds(*parts) for parts in CALCULATION.findall(text)] for texts in responses for text in texts]
    ended = [end for ends in finished for end in ends]
    total = sum(map(len, shown))
    return Score(
        accuracy=sum(bool(one.exact_match) and not one.malformed for row in found.answers for one in row) / len(shown),
        malformed=found.malformed,
        calculations=total / len(shown),
        hold=sum(map(sum, shown)) / total if total else 0.0,
        sound=sum(end and len(one) > 0 and all(one) for end, one in zip(ended, shown, strict=True)) / len(shown),
        rep_4=found.rep_4,
    )


def holds(calculation: str, result: str) -> bool:
    """Returns whether a calculation of numbers, + - * / and brackets gives the result; False if it cannot be parsed."""
    try:
        value, stated = (_value(ast.parse(text.strip(), mode="eval").body) for text in (calculation, result))
        return math.isclose(value, stated, rel_tol=ROUNDED, abs_tol=ROUNDED)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):  # MemoryError: too many brackets
        return False


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return _value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(ast.unparse(node))
