"""The results of all rounds: one table (terminal and CSV) and one HTML report."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from megatron_spo.files import write_output
from megatron_spo.report.runs import is_number, read_run
from megatron_spo.rounds.spec import Rounds
from megatron_spo.rounds.stages import Stage, groups_of, pairs_of, scores_of

Row = dict[str, Any]
SHOWN = ("exact_match", "malformed")
"""Scores of the test answers that are shown in the terminal."""
OF_PAIRS = ("spo/chosen_shift", "spo/rejected_shift", "accuracy/mean")
"""Scores of the test pairs that are in the table; the shifts are those from the first model."""
OF_RUN = {"policy/entropy": "entropy", "spo/gap": "gap"}
"""Metrics at the end of the training that are in the table."""
STEPS = {"sample": "sample", "pairs": "pairs", "reference": "reference", "train": "train", "export": "export",
         "test": "evaluate", "evaluate": "evaluate"}  # fmt: skip
"""First word of a stage's name -> part of the time."""


def rows_of(rounds: Rounds) -> list[Row]:
    """Returns a row for each round of which at least one stage is done; round 0 is the first model."""
    found = []
    for number in range(rounds.spec.rounds + 1):
        stages = [stage for group in groups_of(rounds, number) for stage in group]
        if any(stage.is_done for stage in stages):
            state = "done" if all(stage.is_done for stage in stages) else "unfinished"
            found.append({"round": number, "state": state, **_row(rounds, number, stages)})
    return found


def _row(rounds: Rounds, number: int, stages: Sequence[Stage]) -> Row:
    row: Row = {}
    if (summary := pairs_of(rounds, number).with_suffix(".json")).is_file():
        known = json.loads(summary.read_text())
        row |= {"prompts": known["prompts"], "pairs": known["pairs"]}
        row["share with a pair"] = known["prompts_with_pairs"] / known["prompts"]
        row |= {f"without: {reason}": count for reason, count in known["without_pairs"].items()}
        row["score of samples"] = known["means"]["score"]
    for name, path in scores_of(rounds, number).items():
        if path.is_file():
            row |= _scores(name, json.loads(path.read_text()))
    run = rounds.folder(number) / "run"
    if (run / "metrics.jsonl").is_file():
        read = read_run(run)
        last = {**read.last(None), **(read.last(read.eval_sets[0]) if read.eval_sets else {})}
        row |= {name: last[metric] for metric, name in OF_RUN.items() if is_number(last.get(metric))}
    return row | {f"seconds: {part}": seconds for part, seconds in seconds_of(stages).items()}


def seconds_of(stages: Sequence[Stage]) -> dict[str, float]:
    """Returns the seconds of the commands of a round by part, without interrupted attempts."""
    found: dict[str, float] = {}
    for stage in stages:
        if stage.is_done:
            part = STEPS[stage.name.partition("-")[0]]
            found[part] = found.get(part, 0.0) + stage.seconds
    return found


def _scores(name: str, found: Mapping[str, Any]) -> Row:
    scores = found["scores"] if name == "pairs" else found["files"][0]["scores"]
    wanted = {key: value for key, value in scores.items() if name != "pairs" or key in OF_PAIRS}
    numbers = {key: value["value"] if isinstance(value, dict) else value for key, value in wanted.items()}
    return {f"{name} {key}": value for key, value in numbers.items() if is_number(value)}


def shown(rows: Sequence[Row]) -> str:
    """Returns the main columns as a table for the terminal, one line per round."""
    names = dict.fromkeys(name for row in rows for name in row)
    kept = [name for name in names if _is_main(name)]
    cells = [[_cell(row.get(name)) for name in kept] for row in rows]
    return tabulate(cells, kept, tablefmt="plain", disable_numparse=True, colalign=["right"] * len(kept))


def _is_main(name: str) -> bool:
    test, _, score = name.partition(" ")
    main = ("round", "state", "pairs", "share with a pair", "score of samples", *OF_RUN.values())
    return name in main or (test == "pairs" and score in OF_PAIRS) or (test.startswith("t") and score in SHOWN)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write_results(rounds: Rounds) -> str:
    """Writes OUT/table.csv and OUT/report.html; returns the table for the terminal."""
    rows = rows_of(rounds)
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    write_output(rounds.out / "table.csv", text.getvalue())
    write_report(rounds, rows)
    return shown(rows)


def write_report(rounds: Rounds, rows: Sequence[Row]) -> None:
    """Writes the page: a table and curves over the rounds, the time of the stages, and the report of all trainings."""
    from megatron_spo.report.figures import PALETTE, Curve, draw_curves, draw_stacked  # imports matplotlib
    from megatron_spo.report.page import grid, legend, note, section, table, write_page
    from megatron_spo.report.sections import make_sections

    names = [name for name in dict.fromkeys(name for row in rows for name in row) if not name.startswith("seconds")]
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    figures = []
    for name in names:
        points = [(row["round"], float(row[name])) for row in rows if is_number(row.get(name))]
        if name != "round" and len({value for _, value in points}) > 1:
            figures.append(draw_curves([Curve(name, PALETTE[0], points)], name, over="round"))
    parts = dict.fromkeys(STEPS.values())
    colours = dict(zip(parts, PALETTE, strict=False))
    times = {
        f"round {row['round']}": {part: row.get(f"seconds: {part}", 0.0) for part in parts}
        for row in rows
        if row["round"]
    }
    runs = {f"round {row['round']}": rounds.folder(row["round"]) / "run" for row in rows}
    read = {name: read_run(run) for name, run in runs.items() if (run / "metrics.jsonl").is_file()}
    about = "Round 0 is the first model. Shifts are changes of the test pairs' log-probs from the first model, in nats."
    sections = [
        section("Rounds", note(about), table(names, cells), grid(*figures)),
        *([section("Time", legend(colours), draw_stacked(times, colours, "seconds by stage"))] if times else []),
        *(make_sections(read) if read else []),
    ]
    write_page(rounds.out / "report.html", f"Rounds: {rounds.path.stem}", sections)
