"""Scores generated answers by pure functions of their text, and estimates means with confidence intervals.

A row is one written by `generate`, or any mapping with the keys read here: `answer` (the right answer), `reference`,
`chosen` or `completion` (an answer to compare with). Words are runs of letters and digits, single punctuation marks,
and single Chinese or Japanese characters.
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
"""Number of resamplings of a bootstrap interval."""


@dataclass(frozen=True)
class AnswerScore:
    """Scores of one answer.

    Attributes:
        exact_match: Whether the final answer is the expected one; None if the row has no expected answer.
        text_match: Whether the answer is the reference answer, apart from white space at both ends; None if the row has
            no reference answer.
        malformed: Whether the answer was cut off by the length limit, is empty, or lacks an expected number.
        rep_4: Share of the runs of 4 words that occurred before in the same answer, 0 to 1.
        length_ratio: Words of the answer per word of the reference answer; None if the row has no reference answer.
    """

    exact_match: bool | None
    text_match: bool | None
    malformed: bool
    rep_4: float
    length_ratio: float | None


AVERAGED = tuple(field.name for field in fields(AnswerScore))
"""Names of the scores that are averaged over rows and have an interval."""


@dataclass(frozen=True)
class Scores:
    """Means over the rows of the means over their answers, named as in AnswerScore; None if no row has a value.

    Attributes:
        distinct_1: Number of different words, as a share of all words in all answers. It falls as answers are added:
            compare only equal numbers of answers.
        distinct_2: The same for runs of 2 words.
        answers: Scores of the answers of each row.
    """

    exact_match: float | None
    text_match: float | None
    malformed: float
    rep_4: float
    distinct_1: float
    distinct_2: float
    length_ratio: float | None
    answers: tuple[tuple[AnswerScore, ...], ...]

    def metrics(self) -> dict[str, float]:
        """Returns the means that are not None, by name."""
        return {name: value for name, value in vars(self).items() if name != "answers" and value is not None}

    def of_rows(self, name: str) -> NDArray[np.float64]:
        """Returns the mean of a score over each row's answers: fp64 [rows], NaN for rows without a value."""
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
    """Returns the scores of the answers to each row; `finished` says whether each answer ended by itself.

    Raises:
        ValueError: If there is no answer, or the three sequences differ in shape.
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
        text_match=means["text_match"],
        malformed=means["malformed"] or 0.0,
        rep_4=means["rep_4"] or 0.0,
        distinct_1=distinct(texts, 1),
        distinct_2=distinct(texts, 2),
        length_ratio=means["length_ratio"],
        answers=tuple(scored),
    )


def score_answer(text: str, finished: bool, expected: str | None, reference: str | None) -> AnswerScore:
    """Returns the scores of one answer; see AnswerScore."""
    given = final_answer(text)
    without = given is None if expected is not None and number_of(expected) is not None else not text.strip()
    words = len(split_words(reference)) if reference else 0
    return AnswerScore(
        exact_match=None if expected is None else is_match(text, expected),
        text_match=text.strip() == reference.strip() if reference else None,
        malformed=not finished or without,
        rep_4=repeated(text, 4),
        length_ratio=len(split_words(text)) / words if words else None,
    )


def split_words(text: str) -> list[str]:
    """Returns the words of a text, punctuation marks included."""
    return _WORD.findall(text)


def repeated(text: str, n: int) -> float:
    """Returns the share of a text's runs of n words that are repetitions, 0 to 1; 0 for a text of fewer words."""
    runs = _runs(split_words(text), n)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def distinct(texts: Iterable[str], n: int) -> float:
    """Returns the number of different runs of n words as a share of all runs in the texts; 0 without any."""
    runs = [run for text in texts for run in _runs(split_words(text), n)]
    return len(set(runs)) / len(runs) if runs else 0.0


def expected_answer(row: Mapping[str, Any]) -> str | None:
    """Returns the right final answer of a row, or None.

    It is the result marked in `answer` (all of `answer` if nothing is marked), else the result marked in the reference
    answer or the number that the reference answer ends in.
    """
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if isinstance(answer, str) and answer.strip():
        return marked(answer) or answer.strip()
    text = reference_text(row) or ""
    return marked(text) or number_at_end(text)


def reference_text(row: Mapping[str, Any]) -> str | None:
    """Returns the answer to compare lengths with, or None.

    It is `reference`, `chosen` or `completion`, or an `answer` that marks its result, and so contains a derivation.
    """
    for key in ("reference", "chosen", "completion"):
        if text := message_text(row.get(key)):
            return text
    answer = row.get("answer")
    return answer if isinstance(answer, str) and marked(answer) is not None else None


def message_text(value: Any) -> str:
    """Returns a string as it is, or the content of the last of a list of messages; empty for anything else."""
    if isinstance(value, str):
        return value
    last = value[-1] if isinstance(value, list) and value else None
    content = last.get("content") if isinstance(last, dict) else None
    return content if isinstance(content, str) else ""


def estimate(values: NDArray[np.float64], *, seed: int = 0) -> Estimate | None:
    """Returns the mean of [rows] values with a percentile bootstrap interval over the rows; None if all are NaN.

    NaNs are ignored. If all values are equal, the interval has no width: the sample then holds no information about
    the variation of other data.
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
    """Returns the mean of `one - other` over the same rows, [rows] each; rows with a NaN in either are ignored."""
    return estimate(one - other, seed=seed)


def _runs(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _row_means(answers: Iterable[Iterable[AnswerScore]], name: str) -> list[float | None]:
    return [_mean(getattr(one, name) for one in row) for row in answers]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
