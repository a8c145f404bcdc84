"""One self-contained HTML page about one or several runs, made from their run directories alone."""

from collections.abc import Sequence
from pathlib import Path

from megatron_spo.errors import UserError
from megatron_spo.report.figures import Curve, draw_curves, run_colours
from megatron_spo.report.page import legend, section, table, write_page
from megatron_spo.report.runs import Run, read_runs

METRICS = {
    "loss": "Loss",
    "rewards/accuracies": "Share of pairs ranked as the judge did",
    "spo/chosen_shift": "Change of log p(chosen), nats",
    "spo/rejected_shift": "Change of log p(rejected), nats",
    "spo/both_down": "Share of pairs where both fell",
    "spo/gap": "Gap g - v, nats a chosen token",
    "spo/lambda": "Lambda",
}
"""What is drawn and tabulated: name in metrics.jsonl -> title of the picture."""


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Writes the page `out` about the run directories `runs`. Raises UserError if one of them is none."""
    if not runs:
        raise UserError("report: name at least one run directory")
    read = read_runs([Path(run) for run in runs])
    colours = run_colours(list(read))
    figures = [
        (title, draw_curves(curves, title))
        for metric, title in METRICS.items()
        if (curves := metric_curves(read, metric, colours))
    ]
    sections = [
        section("Final numbers", table(*final_numbers(read))),
        section("Curves", legend(colours), *(svg for _, svg in figures), grid=True),
    ]
    if len(read) > 1:
        sections.append(section("What differs between the runs", table(*config_differences(read))))
    write_page(Path(out), "SPO: " + ", ".join(read), sections)


def metric_curves(runs: dict[str, Run], metric: str, colours: dict[str, str]) -> list[Curve]:
    """The metric over the steps, a curve for each run and data set; training lies faint behind held-out."""
    curves = []
    for name, run in runs.items():
        held_out = [points for data in run.eval_sets if (points := run.points(metric, data)) and len(points) > 1]
        training = run.points(metric, None)
        if training:
            curves.append(Curve(name, colours[name], training, faint=bool(held_out)))
        curves += [Curve(name, colours[name], points) for points in held_out]
    return curves


def final_numbers(runs: dict[str, Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the last line of every run on its training batch and on each held-out set."""
    header = ["run", "data", "step", *METRICS, "state"]
    rows = []
    for name, run in runs.items():
        for data in (None, *run.eval_sets):
            line = run.last(data)
            numbers = [f"{line[metric]:.4g}" if metric in line else "" for metric in METRICS]
            rows.append([name, data or "last batch", str(line["step"]), *numbers, run.state])
    return header, rows


def config_differences(runs: dict[str, Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the configuration keys whose values are not the same in all runs."""
    keys = sorted({key for run in runs.values() for key in run.config})
    rows = [[key, *(run.config.get(key, "") for run in runs.values())] for key in keys]
    return ["key", *runs], [row for row in rows if len(set(row[1:])) > 1]
