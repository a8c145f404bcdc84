"""Files of answers: read, scored, compared, and handed on to AlpacaEval."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_spo.data.json_lines import read_rows
from megatron_spo.data.prompts import check_prompt
from megatron_spo.errors import UserError
from megatron_spo.evaluate.scores import AVERAGED, Estimate, Scores, difference, estimate, score

LABELS = {
    "exact_match": "exact match",
    "malformed": "malformed",
    "rep_4": "repeated 4-grams",
    "length_ratio": "length / reference",
    "distinct_1": "distinct words",
    "distinct_2": "distinct 2-grams",
}


@dataclass(frozen=True)
class Answers:
    """A file of answers and its scores; `rows` as `generate` wrote them, `lines` where each stands."""

    path: Path
    lines: list[int]
    rows: list[dict[str, Any]]
    scores: Scores

    def estimates(self) -> dict[str, Estimate]:
        """Every mean that the file allows, with its interval."""
        found = {name: estimate(self.scores.of_rows(name)) for name in AVERAGED}
        return {name: value for name, value in found.items() if value is not None}

    def as_json(self) -> dict[str, Any]:
        """Everything that was found, as plain data."""
        return {
            "answers": str(self.path),
            "scores": {**self.scores.metrics(), **{name: asdict(one) for name, one in self.estimates().items()}},
            "rows": [[asdict(one) for one in row] for row in self.scores.answers],
        }


def read_answers(path: Path) -> Answers:
    """The answers in a file that `generate` wrote, scored. Raises UserError naming the line that is none of these."""
    lines, rows = [], []
    for line, row in read_rows(path):
        check_prompt(row, path, line)
        if problem := _problem(row.get("responses"), row.get("finished")):
            raise UserError(f"{path} line {line}: {problem}; `megatron-spo generate` writes such files")
        lines.append(line)
        rows.append(row)
    scores = score(rows, [row["responses"] for row in rows], [row["finished"] for row in rows])
    return Answers(path, lines, rows, scores)


def _problem(responses: Any, finished: Any) -> str | None:
    if not isinstance(responses, list) or not responses or not all(isinstance(text, str) for text in responses):
        return "field `responses` must be a list of one or more strings"
    if not isinstance(finished, list) or [type(one) for one in finished] != [bool] * len(responses):
        return f"field `finished` must be a list of {len(responses)} booleans, one for each response"
    return None


def differences(one: Answers, other: Answers) -> dict[str, Estimate]:
    """Mean of `other - one` over the same rows, with intervals. Raises UserError where the prompts are not the same."""
    prompts = [[row["prompt"] for row in answers.rows] for answers in (one, other)]
    if len(prompts[0]) != len(prompts[1]):
        raise UserError(
            f"{one.path} has {len(prompts[0])} rows, {other.path} {len(prompts[1])}; a difference is taken row by row: "
            "answer the same prompts with both models"
        )
    for i, (mine, theirs) in enumerate(zip(*prompts, strict=True)):
        if mine != theirs:
            raise UserError(f"{other.path} line {other.lines[i]}: its prompt is not that of {one.path} line "
                            f"{one.lines[i]}")  # fmt: skip
    found = {name: difference(other.scores.of_rows(name), one.scores.of_rows(name)) for name in AVERAGED}
    return {name: value for name, value in found.items() if value is not None}


def alpaca_eval(answers: Answers, generator: str) -> list[dict[str, str]]:
    """The answers as AlpacaEval's judge reads them. Raises UserError for rows that it cannot hold."""
    outputs = []
    for line, row in zip(answers.lines, answers.rows, strict=True):
        where = f"{answers.path} line {line}"
        if len(row["responses"]) != 1:
            raise UserError(f"{where}: {len(row['responses'])} responses; AlpacaEval judges one (--samples 1)")
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            if [message["role"] for message in prompt] != ["user"]:
                raise UserError(f"{where}: AlpacaEval's instruction is a single message of the user")
            prompt = prompt[0]["content"]
        more = {"dataset": str(row["dataset"])} if "dataset" in row else {}
        outputs.append({**more, "instruction": prompt, "output": row["responses"][0], "generator": generator})
    return outputs


def table(answers: Sequence[Answers], compared: Mapping[str, Estimate]) -> str:
    """What a screen shows: a score a line, with intervals, and the difference of two files."""
    header = ["", *(file.path.name for file in answers), *(["difference, paired"] if compared else [])]
    columns = [file.estimates() for file in answers]
    lines = [header]
    for name, label in LABELS.items():
        values = [file.scores.metrics().get(name) for file in answers]
        if any(value is not None for value in values):
            cells = [show(one.get(name), value) for one, value in zip(columns, values, strict=True)]
            lines.append([label, *cells, *([show(compared.get(name), None, sign="+")] if compared else [])])
    counts = [f"{len(file.rows)} / {sum(map(len, file.scores.answers))}" for file in answers]
    return aligned([*lines, ["rows / answers", *counts]])


def show(found: Estimate | None, value: float | None, *, sign: str = "") -> str:
    """A number, with its interval where there is one."""
    if found is None:
        return "" if value is None else f"{value:{sign}.3f}"
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as columns of text; a row may be shorter than the first."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows)
