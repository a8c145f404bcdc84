"""Reads, scores and compares files of answers, and converts them for AlpacaEval."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from megatron_spo.data.json_lines import read_rows
from megatron_spo.data.prompts import check_prompt
from megatron_spo.errors import UserError
from megatron_spo.evaluate.scores import AVERAGED, Estimate, Scores, difference, estimate, score

LABELS = {
    "exact_match": "exact match",
    "text_match": "same text as reference",
    "malformed": "malformed",
    "rep_4": "repeated 4-grams",
    "length_ratio": "length / reference",
    "distinct_1": "distinct words",
    "distinct_2": "distinct 2-grams",
    "reward": "reward or judge's score",
}
REWARD = "reward"


@dataclass(frozen=True)
class Answers:
    """A file of answers and its scores.

    Attributes:
        path: The file.
        lines: Line number of each row.
        rows: The rows, as `generate` wrote them.
        scores: Their scores.
        rewards: Scores of each row's responses by a reward model or a judge, if there are any.
    """

    path: Path
    lines: list[int]
    rows: list[dict[str, Any]]
    scores: Scores
    rewards: list[list[float]] | None = None

    def of_rows(self, name: str) -> NDArray[np.float64]:
        """Returns the mean of a score over each row's answers: fp64 [rows], NaN for rows without a value."""
        if name == REWARD:
            return np.array(
                [np.nan] * len(self.rows) if self.rewards is None else [np.mean(row) for row in self.rewards]
            )
        return self.scores.of_rows(name)

    def estimates(self) -> dict[str, Estimate]:
        """Returns every mean that can be computed from the file, with its interval."""
        found = {name: estimate(self.of_rows(name)) for name in (*AVERAGED, REWARD)}
        return {name: value for name, value in found.items() if value is not None}

    def note(self) -> str:
        """Returns which rows exact match is computed from, if not from all."""
        known = int(np.count_nonzero(~np.isnan(self.scores.of_rows("exact_match"))))
        if known == len(self.rows):
            return ""
        how = "; put it into the field `answer`" if known == 0 else ""
        return f"exact match: {known} of {len(self.rows)} rows of {self.path.name} have an expected answer{how}"

    def as_json(self) -> dict[str, Any]:
        """Returns all scores as JSON-serializable data."""
        return {
            "answers": str(self.path),
            "scores": {**self.scores.metrics(), **{name: asdict(one) for name, one in self.estimates().items()}},
            "rows": [[asdict(one) for one in row] for row in self.scores.answers],
            **({} if self.rewards is None else {"rewards": self.rewards}),
        }


def read_answers(path: Path) -> Answers:
    """Reads and scores a file of answers written by `generate`.

    Raises:
        UserError: If a line is not a row of answers; the message names the line.
    """
    numbers, found = zip(*answer_rows(path), strict=True)
    lines, rows = list(numbers), list(found)
    scores = score(rows, [row["responses"] for row in rows], [row["finished"] for row in rows])
    return Answers(path, lines, rows, scores)


def answer_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, row) for each row of a file of answers written by `generate`.

    Raises:
        UserError: If a line is not a row of answers; the message names the line.
    """
    for line, row in read_rows(path):
        check_prompt(row, path, line)
        if problem := _problem(row.get("responses"), row.get("finished")):
            raise UserError(f"{path} line {line}: {problem}; use a file written by `megatron-spo generate`")
        yield line, row


def _problem(responses: Any, finished: Any) -> str | None:
    if not isinstance(responses, list) or not responses or not all(isinstance(text, str) for text in responses):
        return "field `responses` must be a list of one or more strings"
    if not isinstance(finished, list) or [type(one) for one in finished] != [bool] * len(responses):
        return f"field `finished` must be a list of {len(responses)} booleans, one for each response"
    return None


def differences(one: Answers, other: Answers) -> dict[str, Estimate]:
    """Returns the mean of `other - one` over the same rows, with intervals.

    Raises:
        UserError: If the prompts differ.
    """
    prompts = [[row["prompt"] for row in answers.rows] for answers in (one, other)]
    if len(prompts[0]) != len(prompts[1]):
        raise UserError(
            f"{one.path} has {len(prompts[0])} rows and {other.path} has {len(prompts[1])}, but a comparison needs the "
            "same rows; answer the same prompts with both models"
        )
    for i, (mine, theirs) in enumerate(zip(*prompts, strict=True)):
        if mine != theirs:
            raise UserError(f"{other.path} line {other.lines[i]}: the prompt differs from {one.path} line "
                            f"{one.lines[i]}; answer the same prompts with both models")  # fmt: skip
    found = {name: difference(other.of_rows(name), one.of_rows(name)) for name in (*AVERAGED, REWARD)}
    return {name: value for name, value in found.items() if value is not None}


def alpaca_eval(answers: Answers, generator: str) -> list[dict[str, str]]:
    """Returns the answers in AlpacaEval's format.

    Raises:
        UserError: If a row has several responses or is not a single user message.
    """
    outputs = []
    for line, row in zip(answers.lines, answers.rows, strict=True):
        where = f"{answers.path} line {line}"
        if len(row["responses"]) != 1:
            raise UserError(f"{where}: {len(row['responses'])} responses, but AlpacaEval judges one; generate with "
                            "--samples 1")  # fmt: skip
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            if [message["role"] for message in prompt] != ["user"]:
                raise UserError(f"{where}: AlpacaEval supports only prompts of a single user message")
            prompt = prompt[0]["content"]
        more = {"dataset": str(row["dataset"])} if "dataset" in row else {}
        outputs.append({**more, "instruction": prompt, "output": row["responses"][0], "generator": generator})
    return outputs


def table(answers: Sequence[Answers], compared: Mapping[str, Estimate], wins: Estimate | None = None) -> str:
    """Returns a table for the terminal: one score per line with intervals, and the difference of two files.

    `wins` is the share of comparisons that the second file wins.
    """
    header = ["", *(file.path.name for file in answers), *(["difference, paired"] if compared else [])]
    columns = [file.estimates() for file in answers]
    lines = [header]
    for name, label in LABELS.items():
        values = [file.scores.metrics().get(name) for file in answers]
        if any(value is not None for value in values) or any(name in column for column in columns):
            cells = [show(one.get(name), value) for one, value in zip(columns, values, strict=True)]
            lines.append([label, *cells, *([show(compared.get(name), None, sign="+")] if compared else [])])
    counts = [f"{len(file.rows)} / {sum(map(len, file.scores.answers))}" for file in answers]
    lines += [["win rate", "", show(wins, None)]] if wins else []
    notes = [note for file in answers if (note := file.note())]
    return "\n".join([aligned([*lines, ["rows / answers", *counts]]), *notes])


def show(found: Estimate | None, value: float | None, *, sign: str = "") -> str:
    """Returns a number as text, with its interval if there is one."""
    if found is None:
        return "" if value is None else f"{value:{sign}.3f}"
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of cells as aligned columns of text; a row may be shorter than the first."""
    return tabulate(rows, tablefmt="plain", disable_numparse=True)
