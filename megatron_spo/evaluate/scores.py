"""Scores of generated answers: pure functions over text, and what chance leaves open about their means.

A row is what `generate` writes, or any mapping with the keys read here: `answer` (what is right), `reference`, `chosen`
or `completion` (an answer to compare with). Words are runs of letters and digits, single signs, and single Chinese or
Japanese characters.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_spo.evaluate.final_answers import final_answer, is_match, marked, number_at_end, number_of

_SINGLE = "\u3040-\u30ff\u3400-\u9fff"  # kana and Chinese characters: no spaces between words
_WORD = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]+|[^\w\s]")
DRAWS = 2000
"""Resamplings of a bootstrap interval."""


@dataclass(frozen=True)
class AnswerScore:
    """One answer.

    Attributes:
        exact_match: whether the final answer is the expected one; None where the row has none.
        malformed: cut off by the length limit, empty, or without a final answer where a number is expected.
        rep_4: share of the runs of 4 words that occurred before in the same answer, 0 to 1.
        length_ratio: words of the answer per word of the reference answer; None where the row has none.
    """

    exact_match: bool | None
    malformed: bool
    rep_4: float
    length_ratio: float | None


AVERAGED = tuple(field.name for field in fields(AnswerScore))
"""What is averaged over the rows, and so has an interval."""


@dataclass(frozen=True)
class Scores:
    """Means over the rows of the means over their answers, under the names of AnswerScore; None where no row has any.

    Attributes:
        distinct_1, distinct_2: different words, and runs of 2, as a share of all of them in all answers together. They
            fall as answers are added: compare equal numbers of answers only.
        answers: of each row, the scores of its answers.
    """

    exact_match: float | None
    malformed: float
    rep_4: float
    distinct_1: float
    distinct_2: float
    length_ratio: float | None
    answers: tuple[tuple[AnswerScore, ...], ...]

    def metrics(self) -> dict[str, float]:
        """The means that there are, by name."""
        return {name: value for name, value in vars(self).items() if name != "answers" and value is not None}

    def of_rows(self, name: str) -> NDArray[np.float64]:
        """[rows] mean of an AnswerScore's attribute over each row's answers; NaN where a row has none."""
        return np.array(_row_means(self.answers, name), dtype=np.float64)


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% bootstrap interval over `rows` rows."""

    value: float
    low: float
    high: float
    rows: int


def score(
    rows: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[str]], finished: Sequence[Sequence[bool]]
) -> Scores:
    """Scores of the answers to each row; `finished`: whether an answer ended by itself.

    Raises:
        ValueError: there is no answer, or the three sequences differ in shape.
    """
    scored = []
    for row, texts, ends in zip(rows, answers, finished, strict=True):
        expected, reference = expected_answer(row), reference_text(row)
        one = (score_answer(text, end, expected, reference) for text, end in zip(texts, ends, strict=True))
        scored.append(tuple(one))
    texts = [text for row in answers for text in row]
    if not texts:
        raise ValueError("there is no answer to score")
    means = {name: _mean(_row_means(scored, name)) for name in AVERAGED}
    return Scores(
        exact_match=means["exact_match"],
        malformed=means["malformed"] or 0.0,
        rep_4=means["rep_4"] or 0.0,
        distinct_1=distinct(texts, 1),
        distinct_2=distinct(texts, 2),
        length_ratio=means["length_ratio"],
        answers=tuple(scored),
    )


def score_answer(text: str, finished: bool, expected: str | None, reference: str | None) -> AnswerScore:
    """Scores of one answer; see AnswerScore."""
    given = final_answer(text)
    without = given is None if expected is not None and number_of(expected) is not None else not text.strip()
    words = len(split_words(reference)) if reference else 0
    return AnswerScore(
        exact_match=None if expected is None else is_match(text, expected),
        malformed=not finished or without,
        rep_4=repeated(text, 4),
        length_ratio=len(split_words(text)) / words if words else None,
    )


def split_words(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(text)


def repeated(text: str, n: int) -> float:
    """Share of a text's runs of n words that are repetitions, 0 to 1; 0 for a text of fewer words."""
    runs = _runs(split_words(text), n)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def distinct(texts: Iterable[str], n: int) -> float:
    """Different runs of n words as a share of all in the texts together; 0 where there is none."""
    runs = [run for text in texts for run in _runs(split_words(text), n)]
    return len(set(runs)) / len(runs) if runs else 0.0


def expected_answer(row: Mapping[str, Any]) -> str | None:
    """The right final answer: of `answer` (all of it unless it marks one), else the mark or the number that the row's
    reference answer ends in; None where there is neither."""
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if isinstance(answer, str) and answer.strip():
        return marked(answer) or answer.strip()
    text = reference_text(row) or ""
    return marked(text) or number_at_end(text)


def reference_text(row: Mapping[str, Any]) -> str | None:
    """The answer to compare lengths with: `reference`, `chosen` or `completion`, or an `answer` that is worked out."""
    for key in ("reference", "chosen", "completion"):
        if text := message_text(row.get(key)):
            return text
    answer = row.get("answer")
    return answer if isinstance(answer, str) and marked(answer) is not None else None


def message_text(value: Any) -> str:
    """A string, or what the assistant says last in a list of messages; empty for anything else."""
    if isinstance(value, str):
        return value
    last = value[-1] if isinstance(value, list) and value else None
    content = last.get("content") if isinstance(last, dict) else None
    return content if isinstance(content, str) else ""


def estimate(values: NDArray[np.float64], *, seed: int = 0) -> Estimate | None:
    """Mean of [rows] values with a percentile bootstrap over the rows; NaNs are left out; None where all are.

    Where all values are equal, so are the bounds: the sample then says nothing of what it has not met.
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    rng, block = np.random.default_rng(seed), max(1, 4_000_000 // len(known))
    means = [
        known[rng.integers(0, len(known), size=(min(block, DRAWS - start), len(known)))].mean(axis=1)
        for start in range(0, DRAWS, block)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(known.mean()), float(low), float(high), len(known))


def difference(one: NDArray[np.float64], other: NDArray[np.float64], *, seed: int = 0) -> Estimate | None:
    """Mean of `one - other` of the same rows, [rows] each; rows that either lacks are left out."""
    return estimate(one - other, seed=seed)


def _runs(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _row_means(answers: Iterable[Iterable[AnswerScore]], name: str) -> list[float | None]:
    return [_mean(getattr(one, name) for one in row) for row in answers]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
