"""Figures of fits: the law over its points with a band, profiles of equal compute, residuals, parameters by group."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, LogLocator, MaxNLocator, NullFormatter

from megatron_spo.report import figures
from megatron_spo.scaling.additive import CHINCHILLA
from megatron_spo.scaling.amounts import amount
from megatron_spo.scaling.fit import Fit
from megatron_spo.scaling.groups import Grouped
from megatron_spo.scaling.law import LEVEL, Values
from megatron_spo.scaling.points import Columns

COLUMNS = 3
"""Most panels side by side."""
CURVES = 6
"""Most curves of a panel; with more values of what distinguishes them, some are left out."""
BAND_DRAWS = 200
"""Most draws of the bootstrap for a band."""
PROFILES = 5
"""Most budgets of the profiles of equal compute."""
NARROW = 1.5
"""Ratio of the ends of an axis below which it is linear."""
GREY = figures.PALETTE[7]
Panel = Callable[[Axes], None]


def draw(panels: Sequence[Panel]) -> Figure:
    """Returns a figure with at most COLUMNS panels side by side."""
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(figures.SIZE[0] * columns, figures.SIZE[1] * rows), layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, panel in zip(places, panels, strict=False):
            panel(axes)
        for axes in places[len(panels) :]:
            axes.set_axis_off()
    return figure


def panels_of(fit: Fit) -> list[Panel]:
    """Returns the panels of a fit: law and points, profiles of equal compute (chinchilla), observed over predicted."""
    panels: list[Panel] = [lambda axes: law_panel(axes, fit)]
    if fit.law.name == "chinchilla" and fit.refusal is None:
        panels.append(lambda axes: profile_panel(axes, fit))
    if fit.values is not None:
        panels.append(lambda axes: residual_panel(axes, fit))
    return panels


def panels_of_groups(grouped: Grouped) -> list[Panel]:
    """Returns the panels of several fits: one per group with the law, and one with the parameters of all groups."""

    def panel_of(name: str, fit: Fit) -> Panel:
        return lambda axes: law_panel(axes, fit, title=name)

    return [*(panel_of(name, fit) for name, fit in grouped.fits.items()), *parameter_panels(grouped)]


def law_panel(axes: Axes, fit: Fit, *, title: str | None = None) -> None:
    """Draws points, the law with its band, and the held-out points, which are marked by squares.

    A curve stands for one value of the column that distinguishes the curves, such as N. Runs that never crossed the
    bound (law stability) have hollow markers.
    """
    x_name, line_name = axes_of(fit)
    points, x = fit.points, fit.points[x_name]
    y = points[fit.law.outcome]
    lines = np.zeros(len(x)) if line_name is None else points[line_name]
    shown = _spread(np.unique(lines))
    colours = dict(zip(shown, colormaps["viridis"](np.linspace(0.05, 0.85, len(shown))), strict=True))
    hollow = points["crossed"] == 0 if "crossed" in points else np.zeros(len(x), dtype=bool)
    for value in np.unique(lines):
        here = lines == value
        colour = colours.get(value, colours[min(shown, key=lambda one: abs(np.log1p(one) - np.log1p(value)))])
        _markers(axes, x[here], y[here], colour, hollow[here], fit.held_out[here])
        if fit.values is not None and value in colours:
            label = None if line_name is None else f"{line_name} = {amount(value)}"
            _curve(axes, fit, x_name, {name: column[here] for name, column in points.items()}, colour, label)
    _log_axes(axes, x=bool(x.min() > 0), y=bool(y.min() > 0 and fit.law.outcome != "reward"))
    axes.set(title=title or fit.law.name, xlabel=fit.report["columns"].get(x_name, x_name), ylabel=label_of(fit))
    axes.grid(alpha=0.2)
    if line_name is not None and fit.values is not None:
        axes.legend(fontsize=8, frameon=False)
    axes.text(0.02, 0.02, note_of(fit), transform=axes.transAxes, fontsize=8, color=GREY, va="bottom")


def axes_of(fit: Fit) -> tuple[str, str | None]:
    """Returns the column of the horizontal axis, and that which distinguishes the curves."""
    if fit.law.name == "stability":
        causes = [name.removeprefix("c_") for name in fit.values or {} if name.startswith("c_")]
        causes = causes or [name for name in fit.points if name not in fit.law.required]
        first = next((name for name in ("N", "rows", "lr", "beta", "lambda") if name in causes), "steps")
        return first, next(
            (name for name in ("lambda", "lr", "rows", "beta") if name in causes and name != first), None
        )
    known = {
        "chinchilla": ("D", "N"),
        "repeats": ("D", "U"),
        "repeats_excess": ("D", "U"),
        "overoptimization": ("kl", None),
    }
    return known.get(fit.law.name, ("x", None))


def label_of(fit: Fit) -> str:
    """Returns the name of the outcome in the file of points, or in the law."""
    return str(fit.report["columns"].get(fit.law.outcome, fit.law.outcome))


def note_of(fit: Fit) -> str:
    """Returns the extrapolation error, or why there is none."""
    if fit.refusal is not None:
        return "not determined by the points"
    held = fit.report["held_out"]
    return (
        f"squares: held out; predicted from the rest\nwith a mean error of {held['mean_absolute']:.2g} ({held['unit']})"
    )


def _markers(axes: Axes, x: np.ndarray, y: np.ndarray, colour: Any, hollow: np.ndarray, held: np.ndarray) -> None:
    for chosen, marker, size in ((~held, "o", 16), (held, "s", 30)):
        for open_ones in (False, True):
            which = chosen & (hollow == open_ones)
            faces = "none" if open_ones else colour
            axes.scatter(x[which], y[which], s=size, marker=marker, facecolors=faces, edgecolors=colour, linewidths=1)


def _curve(axes: Axes, fit: Fit, x_name: str, points: Columns, colour: Any, label: str | None) -> None:
    """Draws the law over the range of x of all points, the other columns at their medians of these points."""
    whole = fit.points[x_name]
    low, high = whole[whole > 0].min(), whole.max()
    grid = np.geomspace(low, high, 80)
    at = {name: np.full(len(grid), float(np.median(column))) for name, column in points.items()} | {x_name: grid}
    if "U" in at and x_name == "D":
        at["U"] = np.minimum(at["U"], grid)
    assert fit.values is not None
    axes.plot(grid, fit.law.predict(fit.values, at), color=colour, linewidth=1.4, label=label)
    draws = list(fit.draws.values())[:BAND_DRAWS]
    if fit.refusal is None and draws:
        around = _predictions(fit, draws, at)
        axes.fill_between(grid, *around, color=colour, alpha=0.15, linewidth=0)


def _predictions(fit: Fit, draws: Sequence[Values], at: Columns) -> np.ndarray:
    found = np.stack([fit.law.predict(draw, at) for draw in draws])
    band: np.ndarray = np.percentile(found, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0)
    return band


def profile_panel(axes: Axes, fit: Fit) -> None:
    """Draws the loss over N at equal compute 6 N D, the valley of each curve, and the points of about that compute."""
    n, flops, loss = fit.points["N"], 6 * fit.points["N"] * fit.points["D"], fit.points["loss"]
    assert fit.values is not None
    budgets = np.geomspace(flops.min(), flops.max(), PROFILES + 2)[1:-1]
    near = np.abs(np.log(flops[:, None]) - np.log(budgets)).argmin(1)
    for i, budget in enumerate(budgets):
        colour = colormaps["viridis"](0.05 + 0.8 * i / max(1, len(budgets) - 1))
        best = CHINCHILLA.optimum(fit.values, float(budget))
        low, high = min(n.min(), best["N"]), max(n.max(), best["N"])
        grid = np.geomspace(low, high, 80)
        axes.plot(grid, fit.law.predict(fit.values, {"N": grid, "D": budget / 6 / grid}), color=colour, linewidth=1.4,
                  label=f"{budget:.1e}")  # fmt: skip
        axes.plot(best["N"], best["loss"], "*", color=colour, markersize=11, markeredgecolor=figures.TEXT)
        close = (near == i) & (np.abs(np.log(flops / budget)) < np.log(1.5))
        axes.scatter(n[close], loss[close], s=14, color=colour)
    _log_axes(axes, x=True, y=True)
    bottom = min(loss.min(), fit.values["E"] + 1e-9 if fit.values["E"] > 0.5 * loss.min() else loss.min())
    axes.set(title="Equal compute", xlabel="N", ylabel=label_of(fit), ylim=(0.98 * bottom, 1.05 * loss.max()))
    axes.legend(title="FLOPs (6 N D)", fontsize=8, title_fontsize=8, frameon=False)
    axes.grid(alpha=0.2)


def residual_panel(axes: Axes, fit: Fit) -> None:
    """Draws observed over predicted values."""
    assert fit.values is not None
    seen, predicted = fit.points[fit.law.outcome], fit.law.predict(fit.values, fit.points)
    hollow = fit.points["crossed"] == 0 if "crossed" in fit.points else np.zeros(len(seen), dtype=bool)
    _markers(axes, predicted, seen, figures.PALETTE[0], hollow, fit.held_out)
    ends = [min(predicted.min(), seen.min()), max(predicted.max(), seen.max())]
    axes.plot(ends, ends, color=GREY, linewidth=1)
    _log_axes(axes, x=ends[0] > 0, y=ends[0] > 0)
    axes.set(title="Observed and predicted", xlabel=f"{label_of(fit)}, predicted", ylabel="observed")
    axes.grid(alpha=0.2)


def parameter_panels(grouped: Grouped) -> list[Panel]:
    """Returns a panel for each exponent (or coefficient): its value and interval in each group, refused fits hollow."""
    first = next((fit for fit in grouped.fits.values() if fit.values is not None), None)
    names = [] if first is None else exponents_of(first)

    def panel_of(name: str) -> Panel:
        return lambda axes: _parameter_panel(axes, grouped.fits, name)

    return [panel_of(name) for name in names]


def exponents_of(fit: Fit) -> list[str]:
    """Returns the parameters of a fit that do not depend on units."""
    names = list(fit.values or {})
    return [name for name in names if name in ("alpha", "beta", "R_D", "R_N") or name.startswith("c_")]


def _parameter_panel(axes: Axes, fits: Mapping[str, Fit], name: str) -> None:
    groups = list(fits)[::-1]
    for place, group in enumerate(groups):
        fit = fits[group]
        if fit.values is None or name not in fit.values:
            continue
        colour = figures.PALETTE[list(fits).index(group) % len(figures.PALETTE)]
        low, high = fit.report.get("intervals", {}).get(name, (np.nan, np.nan))
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        face = colour if fit.refusal is None else "none"
        axes.plot(fit.values[name], place, "o", color=colour, markerfacecolor=face)
    axes.set_yticks(range(len(groups)), groups)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set(title=name, xlabel=f"{name}, with interval of {LEVEL:.0%}", ylim=(-0.6, len(groups) - 0.4))
    axes.grid(alpha=0.2, axis="x")


def reward_panel(axes: Axes, fits: Mapping[str, Fit]) -> None:
    """Draws over-optimization of several groups in one panel: reward over the KL divergence, with the peak marked."""
    for (name, fit), colour in zip(fits.items(), itertools.cycle(figures.PALETTE), strict=False):
        kl, reward = fit.points["kl"], fit.points["reward"]
        axes.scatter(kl, reward, s=14, color=colour, label=name)
        if fit.values is not None:
            _curve(axes, fit, "kl", fit.points, colour, None)
        if (peak := fit.report.get("peak")) and peak["within_points"]:
            axes.plot(peak["kl"], peak["reward"], "*", color=colour, markersize=12, markeredgecolor=figures.TEXT)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set(
        title="Reward and distance", xlabel="KL from the reference, nats", ylabel=label_of(next(iter(fits.values())))
    )
    axes.set_xscale("symlog", linthresh=0.1)
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.2)


def _spread(values: np.ndarray) -> list[float]:
    """Returns at most CURVES of the values, evenly chosen."""
    chosen = np.unique(np.linspace(0, len(values) - 1, min(CURVES, len(values))).round().astype(int))
    return [float(values[i]) for i in chosen]


def _log_axes(axes: Axes, *, x: bool, y: bool) -> None:
    """Sets logarithmic scales, unless an axis spans little; labels are short, such as 30 instead of 3 x 10^1."""
    sides = ((x, axes.xaxis, axes.set_xscale, axes.set_xlim), (y, axes.yaxis, axes.set_yscale, axes.set_ylim))
    for wanted, axis, setter, limit in sides:
        low, high = axis.get_data_interval()
        if high - low < 1e-6 * abs(high):  # one value, up to rounding
            limit(0.9 * low, 1.1 * high)
        if not wanted or high < NARROW * low:
            continue
        setter("log")
        if high < 30 * low:
            wide = high > 2.5 * low
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)) if wide else MaxNLocator(5))
            axis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
            axis.set_minor_formatter(NullFormatter())
        elif axis is axes.yaxis:
            axis.set_major_formatter(LogFormatter())
