"""Writes the table of a study: one row per run, with what varies, its state and its last metrics."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.csv as arrow_csv
import pyarrow.parquet as parquet
from tabulate import tabulate

from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.errors import UserError
from megatron_spo.report.runs import Run, read_run
from megatron_spo.scaling.spec import CrossingSpec
from megatron_spo.scaling.steps import is_done, status, steps_of
from megatron_spo.scaling.study import Study, StudyRun, varied_names
from megatron_spo.subcommands import STOPPED, ending

Row = dict[str, Any]
SHOWN = ("train/loss", "eval/loss", "eval/rewards/accuracies", "eval/spo/chosen_shift")
"""Metrics that are shown in the terminal, besides the columns of `after`; the files have all metrics."""


def make_table(study: Study) -> list[Row]:
    """Writes OUT/table.csv and OUT/table.parquet; returns the rows."""
    rows = [row(study, run) for run in study.runs]
    names = list(dict.fromkeys(name for one in rows for name in one))
    columns = {name: arrow.array(_alike([one.get(name) for one in rows])) for name in names}
    table = arrow.table(columns)
    study.out.mkdir(parents=True, exist_ok=True)
    for name, writer in (("table.csv", arrow_csv.write_csv), ("table.parquet", parquet.write_table)):
        partial = study.out / f".{name}.partial"
        writer(table, partial)
        partial.replace(study.out / name)
    return rows


def row(study: Study, run: StudyRun) -> Row:
    """Returns the row of one run, without metrics that were never written."""
    found: Row = {"run": run.number, **run.choices, **_state(study, run)}
    if (run.directory / "metrics.jsonl").is_file():
        known = read_run(run.directory)
        found |= _cost(known) | _metrics(known)
        if study.spec.crossing is not None and known.lines:
            found |= _crossing(known, study.spec.crossing)
    for step in run.after:
        if step.columns is not None and step.columns.is_file():
            found |= {f"{step.name}/{name}": value for name, value in _object(step.columns).items()}
    return found


def shown(study: Study, rows: Sequence[Row]) -> str:
    """Returns the main columns as a table for the terminal."""
    after = [name for name in dict.fromkeys(name for one in rows for name in one)
             if any(name.startswith(f"{step.name}/") for step in study.runs[0].after)]  # fmt: skip
    names = ["run", *varied_names(study.runs), "state", *after, *SHOWN]
    names = [name for name in dict.fromkeys(names) if any(name in one for one in rows)]
    cells = [names, *([_cell(one.get(name)) for name in names] for one in rows)]
    reasons = ["", *(f"  <- {one['reason']}" if one["reason"] else "" for one in rows)]
    table = tabulate(cells, tablefmt="plain", colalign=["right"] * len(names), disable_numparse=True)
    return "\n".join(line + why for line, why in zip(table.splitlines(), reasons, strict=True))


def _state(study: Study, run: StudyRun) -> Row:
    """Returns the state (done, failed, stopped, unfinished, or missing if not started) and its reason."""
    if all(is_done(run, step, place) for step, place in steps_of(study, run)):
        return {"state": "done", "reason": ""}
    failure = run.folder / "failure.json"
    if failure.is_file():
        known = json.loads(failure.read_text())
        state = "stopped" if known["code"] == STOPPED else "failed"
        return {"state": state, "reason": f"{known['step']} {ending(known['code'])}: {known['reason']}"}
    known = status(run)
    state = "unfinished" if known.get("state") in ("running", "done") else known.get("state", "missing")
    return {"state": state, "reason": known.get("reason", "")}


def _cost(run: Run) -> Row:
    """Returns seconds in steps, optimizer steps, N (parameters), D (tokens computed) and U (those of different pairs).

    Steps without a line in metrics.jsonl are counted as the average of the others.
    """
    lines = run.of(None)
    steps = run.last(None)["step"]
    per_line = steps / max(1, len(lines))
    tokens = sum(line.get("tokens", 0) for line in lines) * per_line
    found: Row = {
        "seconds": sum(line.get("seconds", 0.0) for line in lines) * per_line,
        "training_steps": steps,
        "D": round(tokens),
        "U": round(tokens / max(1.0, run.last(None).get("epoch", 1.0))),
    }
    model = Path(json.loads(run.config.get("model.path", '""')))
    return {"N": read_model_shape(model).parameters, **found} if (model / "config.json").is_file() else found


def _metrics(run: Run) -> Row:
    """Returns the last metrics: `train/...`, `eval/...` for the first held-out set, `eval/NAME/...` for the others."""
    found: Row = {}
    for i, name in enumerate([None, *run.eval_sets]):
        prefix = "train" if name is None else "eval" if i == 1 else f"eval/{name}"
        last = run.last(name)
        found |= {f"{prefix}/{key}": value for key, value in last.items() if isinstance(value, int | float)}
    return {name: value for name, value in found.items() if not name.endswith(("/step", "/seconds", "/tokens"))}


def _crossing(run: Run, crossing: CrossingSpec) -> Row:
    """Returns `crossed` and `steps`: the step at which the metric was first below the bound, or else the last one."""
    data = run.eval_sets[0] if run.eval_sets else None
    points = run.points(crossing.metric, data)
    if not points:
        known = sorted(name for name, value in run.last(data).items() if isinstance(value, float))
        raise UserError(f"crossing.metric = {crossing.metric!r} was not written by the run; use one of "
                        f"{', '.join(known)}")  # fmt: skip
    step = next((step for step, value in points if step > 0 and value < crossing.below), None)
    return {"crossed": step is not None, "steps": points[-1][0] if step is None else step}


def _object(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must be a JSON object with a key for each column")
    return found


def _alike(values: Sequence[Any]) -> list[Any]:
    """Returns values of one type: unchanged if all are numbers, strings or booleans, and else as JSON."""
    kinds = {
        bool if isinstance(v, bool) else float if isinstance(v, int | float) else type(v)
        for v in values
        if v is not None
    }
    if kinds == {float} and any(isinstance(value, float) for value in values):
        return [None if value is None else float(value) for value in values]
    if kinds <= {str} or kinds in ({bool}, {float}):
        return list(values)
    return [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
