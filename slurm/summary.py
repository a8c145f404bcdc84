"""Writes the table of a study: `summary.py FOLDER` reads FOLDER/study.txt and the runs FOLDER/N.

The table is FOLDER/summary.txt. Each line has a run's state and its last metrics on the first held-out set, or on
training batches without one.
"""

import json
import sys
from pathlib import Path
from typing import Any

from megatron_spo.report.runs import read_run

METRICS = ("loss", "rewards/accuracies", "rewards/margins", "spo/gap", "spo/chosen_shift", "spo/both_down")


def row(folder: Path, overrides: str) -> list[str]:
    """Returns the cells of one run: number, state, step, metrics and overrides, with the reason if it is not done."""
    run = folder / "run"
    if not (run / "metrics.jsonl").is_file():
        log = folder / "logs/job.log"
        errors = [line for line in log.read_text().splitlines() if "error:" in line] if log.is_file() else []
        why = errors[-1].partition("error: ")[2] if errors else "not started"
        return [folder.name, "failed" if errors else "-", "0", *["-"] * len(METRICS), f"{overrides}   <- {why}"]
    known = read_run(run)
    status: dict[str, Any] = json.loads((run / "status.json").read_text())
    last = known.last(known.eval_sets[0] if known.eval_sets else None)
    values = [f"{last[name]:.4f}" if last.get(name) is not None else "-" for name in METRICS]
    why = "" if known.state == "done" else f"   <- {status.get('reason', '')}"
    steps = known.last(None)["step"]  # status.json has the step of the newest checkpoint
    return [folder.name, known.state, str(steps), *values, overrides + why]


def table(study: Path) -> str:
    """Returns the table with aligned columns."""
    lines = (study / "study.txt").read_text().splitlines()
    rows = [["run", "state", "step", *METRICS, "overrides"]]
    rows += [row(study / str(number), overrides) for number, overrides in enumerate(lines, 1)]
    widths = [max(len(one[column]) for one in rows) for column in range(len(rows[0]) - 1)]
    aligned = ("  ".join(text.rjust(w) for text, w in zip(one, [*widths, 0], strict=True)) for one in rows)
    return "".join(f"{line}\n" for line in aligned)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "summary.txt").write_text(table(folder))
