"""The page of a study: what varies, how the metrics depend on it, the fits, and all runs."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from scipy.stats import spearmanr

from megatron_spo.errors import UserError
from megatron_spo.report import figures
from megatron_spo.report.page import captioned, grid, legend, note, paragraph, section, table, write_page
from megatron_spo.scaling.amounts import amount
from megatron_spo.scaling.fit import LAWS, Fit, attempt
from megatron_spo.scaling.groups import Grouped, fit_groups
from megatron_spo.scaling.law import Ask
from megatron_spo.scaling.plot import Panel, law_panel, panels_of, parameter_panels, reward_panel
from megatron_spo.scaling.points import read_groups
from megatron_spo.scaling.spec import FitSpec, ScatterSpec, StudySpec
from megatron_spo.scaling.study import Study, run_name, varied_names
from megatron_spo.scaling.table import Row, make_table
from megatron_spo.scaling.text import caption, differences

DRAWN = {
    "eval/spo/chosen_shift": "change of log p(chosen) on held-out pairs, nats per answer",
    "eval/spo/gap": "SFT loss above the reference on held-out pairs, nats per chosen token",
    "eval/loss/sft": "SFT loss on held-out pairs, nats per chosen token",
    "eval/loss/preference": "preference loss on held-out pairs",
    "eval/rewards/accuracies": "share of held-out pairs ranked as by the judge",
}
"""Metrics that are drawn if the study does not list `metrics`, with their meaning."""
MEANINGS = DRAWN | {
    "eval/spo/rejected_shift": "change of log p(rejected) on held-out pairs, nats per answer",
    "eval/spo/both_down": "share of held-out pairs in which both answers lost probability",
    "train/loss/sft": "SFT loss on the last training batches, nats per chosen token",
}
SEED = "training.seed"
COLUMNS = ("N", "D", "U", "training_steps", "seconds")


def write_study_page(study: Study, out: Path, *, bootstrap: int, seed: int) -> str:
    """Writes the page, after the table; returns the results of the fits for the terminal.

    Raises:
        UserError: If the page cannot be written; a fit that is not possible is a note on the page.
    """
    rows = make_table(study)
    varied = varied_names(study.runs)
    done = [row for row in rows if row["state"] == "done"]
    parts = [_overview(study, rows, varied)]
    if done:
        parts += _metrics(study, done, [name for name in varied if name != SEED])
        parts += [_scatter(one, done) for one in study.spec.scatters]
    said = []
    for one in study.spec.fits if done else ():
        part, sentence = _fit(study, one, bootstrap=bootstrap, seed=seed)
        parts.append(part)
        said.append(sentence)
    write_page(out, study.spec.title or study.path.stem, [*parts, _runs(study, rows, varied)])
    return "\n".join([*said, str(out)])


def _overview(study: Study, rows: Sequence[Row], varied: Sequence[str]) -> str:
    states = Counter(str(row["state"]) for row in rows)
    known = ", ".join(f"{count} {state}" for state, count in states.items())
    choices = [[name, ", ".join(dict.fromkeys(str(run.choices[name]) for run in study.runs))] for name in varied]
    hours = sum(row.get("seconds", 0.0) for row in rows) / 3600
    return section(
        "Study",
        paragraph(f"{len(rows)} runs of {study.base} ({known}), {hours:.2g} hours in training steps."),
        table(["what varies", "values"], choices, words=True),
        note("N: parameters. D: tokens computed in training, where a pair counts its prompt once and both answers, "
             "without padding, and again in every epoch. U: tokens of the different pairs among them."),
    )  # fmt: skip


def _metrics(study: Study, rows: Sequence[Row], axes: Sequence[str]) -> list[str]:
    parts = []
    for metric, meaning in _meanings(study.spec).items():
        known = [row for row in rows if isinstance(row.get(metric), int | float)]
        if not known:
            if study.spec.metrics:
                parts.append(section(metric, note("No finished run has this metric.")))
            continue
        x, line, facet = _roles(known, axes)
        names = list(dict.fromkeys(row[line] for row in known)) if line else [""]
        colours, span = figures.run_colours(names), _range_of(known, metric)
        panels = []
        for value in [None] if facet is None else list(dict.fromkeys(row[facet] for row in known)):
            chosen = [row for row in known if facet is None or row[facet] == value]
            title = "" if facet is None else f"{facet.rpartition('.')[2]} = {value}"
            drawn = _picture(_metric_panel(chosen, metric, x, line, colours, span))
            panels.append(captioned(title, drawn))
        shown = {_label(known, line, name): colour for name, colour in colours.items()} if line else {}
        said = paragraph(_extremes(known, metric, meaning, axes))
        parts.append(section(metric, said, grid(*([legend(shown)] if shown else []), *panels)))
    return parts


def _label(rows: Sequence[Row], line: str, name: Any) -> str:
    """Returns the entry of a legend; a model has its number of parameters."""
    sizes = {row["N"] for row in rows if line == "model" and row[line] == name and "N" in row}
    size = f" (N = {amount(sizes.pop())})" if len(sizes) == 1 else ""
    return f"{line.rpartition('.')[2]} {name}{size}"


def _meanings(spec: StudySpec) -> dict[str, str]:
    """Returns the metrics to draw, with the meaning that the study or this package gives them."""
    known = dict(MEANINGS)
    if spec.crossing is not None:
        bound = f"{spec.crossing.metric} on held-out pairs is below {spec.crossing.below:g}"
        known["steps"] = f"steps until {bound}, or until the training ends"
    given = spec.metrics if isinstance(spec.metrics, dict) else dict.fromkeys(spec.metrics)
    return {name: meaning or known.get(name, name) for name, meaning in (given or DRAWN).items()}


def _range_of(rows: Sequence[Row], metric: str) -> tuple[float, float]:
    """Returns the vertical range of all panels of a metric, so that they can be compared."""
    values = [row[metric] for row in rows]
    margin = 0.05 * (max(values) - min(values)) or 0.05 * abs(values[0]) or 0.05
    return min(values) - margin, max(values) + margin


def _roles(rows: Sequence[Row], axes: Sequence[str]) -> tuple[str, str | None, str | None]:
    """Returns the axis of the horizontal direction (the longest with numbers), of the lines, and of the panels."""
    counts = {name: len({str(row[name]) for row in rows}) for name in axes}
    numeric = [name for name in axes if all(isinstance(row[name], int | float) for row in rows)]
    sized = ["N"] if "model" in axes and all("N" in row for row in rows) else []
    order = sorted(numeric, key=lambda name: -counts[name])
    x = (order or sized or list(axes) or ["run"])[0]
    rest = [name for name in axes if name != x and not (x == "N" and name == "model")]
    lines = sorted(rest, key=lambda name: (name != "model", counts[name]))
    line = lines[0] if lines else None
    return x, line, lines[-1] if len(lines) > 1 else None


def _metric_panel(
    rows: Sequence[Row], metric: str, x: str, line: str | None, colours: Mapping[Any, str], span: tuple[float, float]
) -> Panel:
    """Draws the mean over the runs of a setting, with the range over seeds and other choices as a bar."""

    def draw(axes: Axes) -> None:
        places = {value: i for i, value in enumerate(dict.fromkeys(row[x] for row in rows))}
        numeric = all(isinstance(value, int | float) for value in places)
        for name, colour in colours.items():
            found: dict[float, list[float]] = {}
            for row in rows:
                if not line or row[line] == name:
                    found.setdefault(row[x] if numeric else places[row[x]], []).append(row[metric])
            if not found:
                continue
            at = sorted(found)
            mean = np.array([np.mean(found[place]) for place in at])
            ends = np.array([[np.min(found[place]), np.max(found[place])] for place in at]).T
            axes.errorbar(at, mean, np.abs(ends - mean), color=colour, marker="o", markersize=4, capsize=2,
                          linewidth=1.4)  # fmt: skip
        if numeric and min(places) > 0 and max(places) > 3 * min(places):
            axes.set_xscale("log")
            axes.set_xticks(sorted(places), [amount(place) for place in sorted(places)])
            axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        elif not numeric:
            axes.set_xticks(range(len(places)), [str(place) for place in places])
            axes.tick_params("x", labelrotation=30 if len(places) > 4 else 0)
        axes.set(xlabel=x, ylabel=metric, ylim=span)
        axes.grid(alpha=0.2)

    return draw


def _scatter(one: ScatterSpec, rows: Sequence[Row]) -> str:
    title = f"{one.y} over {one.x}"
    known = [row for row in rows if all(isinstance(row.get(name), int | float) for name in (one.x, one.y))]
    if not known or (one.by is not None and one.by not in known[0]):
        return section(title, note("No finished run has these columns."))

    def draw(axes: Axes) -> None:
        for name, colour in zip(dict.fromkeys(str(row[one.by]) if one.by else "" for row in known),
                                itertools.cycle(figures.PALETTE), strict=False):  # fmt: skip
            chosen = sorted((row[one.x], row[one.y]) for row in known if not one.by or str(row[one.by]) == name)
            axes.plot(*zip(*chosen, strict=True), "o", color=colour, markersize=5, label=name)
        axes.set(xlabel=one.x, ylabel=one.y)
        axes.grid(alpha=0.2)
        if one.by:
            axes.legend(fontsize=8, frameon=False)

    x, y = (np.array([row[name] for row in known], dtype=float) for name in (one.x, one.y))
    said = f"One point per run ({len(known)})"
    if len(known) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0:
        said += f"; rank correlation {float(spearmanr(x, y).statistic):.2f}"
    return section(title, paragraph(f"{said}."), grid(_picture(draw)))


def _extremes(rows: Sequence[Row], metric: str, meaning: str, axes: Sequence[str]) -> str:
    """Returns the meaning of a metric, with its lowest and highest value and their settings."""

    def named(row: Row) -> str:
        return ", ".join(f"{name.rpartition('.')[2]} {row[name]}" for name in axes)

    low, high = (pick(rows, key=lambda row: row[metric]) for pick in (min, max))
    first = meaning[:1].upper() + meaning[1:]
    if low[metric] == high[metric]:
        return f"{first}: {low[metric]:.3g} in all runs."
    return f"{first}: from {low[metric]:.3g} ({named(low)}) to {high[metric]:.3g} ({named(high)})."


def _fit(study: Study, one: FitSpec, *, bootstrap: int, seed: int) -> tuple[str, str]:
    """Returns the section of a fit, and its result as text."""
    law = LAWS[one.law]
    only = "".join(f", {name} = {value}" for name, value in one.only.items())
    title = f"Law {one.law}{f' by {one.by}' if one.by else ''}{only}"
    try:
        groups = read_groups(study.out / "table.csv", law.required, law.optional, one.columns, by=one.by, only=one.only)
        if one.by is None:
            found = attempt(law, groups[""], Ask(), bootstrap=bootstrap, seed=seed)
            return section(title, *_single(found)), f"{title}: {caption(found)}"
        grouped = fit_groups(law, one.by, groups, Ask(), bootstrap=bootstrap, seed=seed)
    except UserError as error:
        return section(title, note(f"There is no fit: {error}")), f"{title}: no fit: {error}"
    lines = [f"  {name}: {caption(fit)}" for name, fit in grouped.fits.items()]
    return section(title, *_several(grouped)), "\n".join([f"{title}:", *lines])


def _single(fit: Fit) -> list[str]:
    return [paragraph(caption(fit)), grid(*(_picture(panel) for panel in panels_of(fit))), _parameters({"": fit})]


def _several(grouped: Grouped) -> list[str]:
    pictures = [
        captioned(f"{name}: {caption(fit)}", _picture(_titled(fit, name))) for name, fit in grouped.fits.items()
    ]
    compared = [_picture(panel) for panel in parameter_panels(grouped)]
    if grouped.law.name == "overoptimization":
        compared.append(_picture(lambda axes: reward_panel(axes, grouped.fits)))
    lines = [[line] for one in grouped.report["differences"] for line in differences(one)]
    paired = "the runs of the groups have the same settings, which a draw of the bootstrap keeps together"
    how = paired if grouped.report["paired"] else "the groups have different settings and are drawn independently"
    parts = [grid(*pictures), _parameters(grouped.fits)]
    if lines:
        parts += [table(["difference"], lines, words=True), note(f"Intervals of 95%; {how}.")]
    return [*parts, grid(*compared)]


def _titled(fit: Fit, name: str) -> Panel:
    return lambda axes: law_panel(axes, fit, title=name)


def _parameters(fits: Mapping[str, Fit]) -> str:
    rows = []
    for name, fit in fits.items():
        for parameter, value in (fit.values or {}).items():
            bounds = fit.report.get("intervals", {}).get(parameter)
            shown = f"{bounds[0]:.4g} to {bounds[1]:.4g}" if bounds else ""
            rows.append([name or fit.law.name, parameter, f"{value:.4g}", shown, "" if fit.refusal is None else "no"])
    return table(["", "parameter", "value", "95% interval", "determined"], rows)


def _picture(panel: Panel) -> str:
    with matplotlib.rc_context(figures.STYLE):
        figure, (axes,) = figures.new_figure()
        panel(axes)
        return figures.page_svg(figure)


def _runs(study: Study, rows: Sequence[Row], varied: Sequence[str]) -> str:
    metrics = [name for name in _meanings(study.spec) if any(name in row for row in rows)]
    columns = [name for name in (*COLUMNS, *metrics) if any(name in row for row in rows)]
    cells = [
        [run_name(run, varied), str(row["state"]), *(_cell(row.get(name)) for name in columns), str(row["reason"])]
        for run, row in zip(study.runs, rows, strict=True)
    ]
    return section("Runs", table(["run", "state", *columns, "reason"], cells))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return amount(value) if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
