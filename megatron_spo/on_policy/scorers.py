"""Scores sampled answers: by exact match, a reward model, a key of the row, or a Python function."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_spo.data.json_lines import kind_of
from megatron_spo.errors import UserError
from megatron_spo.evaluate.final_answers import is_match
from megatron_spo.evaluate.scores import expected_answer
from megatron_spo.on_policy.answered import Answered
from megatron_spo.on_policy.rules import PairRules


def score_all(answered: Sequence[Answered], rules: PairRules) -> list[list[float]]:
    """Returns the score of each answer of each row.

    Raises:
        UserError: the scorer cannot be used, fails, takes too long, or gives a score that is not a finite number; the
            message names the row.
    """
    kind, of = rules.scoring
    makers: dict[str, Callable[[], Iterator[Any]]] = {
        "exact_match": lambda: map(_matches, answered),
        "column": lambda: (_column(one, of) for one in answered),
        "model": lambda: _rewards(answered, of, rules.batch_size),
        "function": lambda: _function(answered, of, rules.timeout),
    }
    return [checked(scores, one, rules.scorer) for scores, one in zip(makers[kind](), answered, strict=True)]


def checked(scores: Any, one: Answered, scorer: str) -> list[float]:
    """Returns the scores of a row as floats; raises UserError unless they are finite numbers, one for each answer."""
    what, count = f"{one.where}: {scorer}", len(one.responses)
    if not isinstance(scores, list | tuple):
        raise UserError(f"{what} gives {kind_of(scores)}; must be a list of {count} numbers, one for each response")
    if len(scores) != count:
        raise UserError(f"{what} gives {len(scores)} scores for {count} responses; must be one for each response")
    for i, score in enumerate(scores):
        if not isinstance(score, int | float):
            raise UserError(f"{what} gives {kind_of(score)} as the score of response {i}; must be a number")
        if not abs(score) <= sys.float_info.max:  # an integer may be larger than any float
            raise UserError(f"{what} gives {str(score)[:20]} as the score of response {i}; must be a finite number. "
                            "Correct the scorer, or remove the row")  # fmt: skip
    return [float(score) for score in scores]


def _matches(one: Answered) -> list[float]:
    expected = expected_answer(one.row)
    if expected is None:
        raise UserError(f"{one.where}: field 'answer' is missing, the right final answer that exact_match compares "
                        "with; add it, or use another --scorer")  # fmt: skip
    return [float(is_match(text, expected)) for text in one.responses]


def _column(one: Answered, key: str) -> Any:
    if key not in one.row:
        raise UserError(f"{one.where}: field '{key}' is missing; it must have the scores of the responses "
                        f"(--scorer column={key})")  # fmt: skip
    return one.row[key]


def _rewards(answered: Sequence[Answered], folder: str, batch_size: int) -> Iterator[list[float]]:
    from megatron_spo.on_policy.reward_model import rewards  # imports transformers

    yield from rewards(Path(folder), answered, batch_size)


def _function(answered: Sequence[Answered], name: str, timeout: float) -> Iterator[Any]:
    from megatron_spo.on_policy.function_process import FunctionProcess

    with FunctionProcess(name, timeout) as function:
        for one in answered:
            yield function(one)
