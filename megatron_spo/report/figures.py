"""Draws figures as SVG text that use the page's text colour, and so are readable in light and dark mode."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_spo.report.runs import Points

PALETTE = (
    "#3b82c4",
    "#cf6a28",
    "#3a9d5d",
    "#c44e52",
    "#8f6bb8",
    "#a07855",
    "#c2609d",
    "#7a8788",
    "#8c8c22",
    "#2091a0",
)
"""Colours with a contrast of at least 3:1 against both white and black."""
SIDES = {"chosen": PALETTE[0], "rejected": PALETTE[1]}
ALARM = "#c44e52"
MAX_POINTS = 400
"""Most points of a drawn curve; more would not be visible."""
FEW = 12
"""Most points of a curve that are marked, so that a curve of few points is not overlooked."""
TEXT = "#010203"  # placeholder, replaced by the text colour when the SVG is written
SIZE = (5.2, 3.4)  # inches; small, so that labels stay readable when a phone scales the figure down
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron-spo",  # makes the output reproducible
    "font.family": "sans-serif",
    "font.size": 12,
    "text.color": TEXT,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 13,
}


@dataclass(frozen=True)
class Curve:
    """A curve to draw; `faint` curves are drawn paler and without a label, `alarms` are points to mark."""

    label: str
    colour: str
    points: Points
    faint: bool = False
    dashed: bool = False
    alarms: Points = field(default_factory=list)


def run_colours(names: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each run."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def draw_curves(curves: Sequence[Curve], title: str, over: str = "step") -> str:
    """Returns an SVG of curves over optimizer steps, or over what `over` says."""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure()
        plot_curves(axes, curves, title)
        axes.set_xlabel(over)
        return page_svg(figure)


def draw_bars(values: Mapping[str, float], colours: Mapping[str, str], title: str) -> str:
    """Returns an SVG with one horizontal bar per run, for shares from 0 to 1."""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure()
        plot_bars(axes, values, colours, title)
        return page_svg(figure)


def new_figure(panels: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """Returns a figure with panels side by side."""
    figure = Figure(figsize=(SIZE[0] * panels, SIZE[1]), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def plot_curves(axes: Axes, curves: Sequence[Curve], title: str) -> None:
    """Draws curves over the step; the points of short curves are marked."""
    for curve in curves:
        steps, values = zip(*thinned(curve.points), strict=True)
        axes.plot(
            steps,
            values,
            color=curve.colour,
            label=None if curve.faint else curve.label,
            alpha=0.55 if curve.faint else 1,
            linewidth=1.2 if curve.faint else 2,
            linestyle="--" if curve.dashed else "-",
            marker="o" if len(steps) <= FEW else None,
            markersize=4,
        )
        for step, value in curve.alarms:
            axes.plot(step, value, marker="v", markersize=9, color=ALARM, markeredgecolor=TEXT, clip_on=False)
    axes.set(title=title, xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(alpha=0.2)


def thinned(points: Points) -> Points:
    """Returns at most MAX_POINTS points, among them the minimum and maximum of every section of the curve."""
    if len(points) <= MAX_POINTS:
        return points
    stretches, kept = MAX_POINTS // 2, []
    for i in range(stretches):
        stretch = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept


def draw_shifts(sides: Mapping[str, Sequence[float]]) -> str:
    """Returns an SVG of the distributions of log-prob changes in nats, one colour per side; 0 means no change."""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure()
        everything = np.concatenate([np.asarray(values, dtype=float) for values in sides.values()])
        low, high = np.quantile(everything, [0.005, 0.995])  # a few outliers must not compress all others into one bar
        edges = np.linspace(min(low, 0.0), max(high, 0.0) + 1e-9, 41).tolist()
        for side, values in sides.items():
            shown = np.clip(values, edges[0], edges[-1])
            axes.hist(shown, edges, color=SIDES[side], alpha=0.35)
            axes.hist(shown, edges, color=SIDES[side], histtype="step", linewidth=1.8)
        axes.axvline(0, color=TEXT, linestyle="--", linewidth=1.2)
        axes.set(xlabel="change of log p, nats", ylabel="pairs")
        return page_svg(figure)


def draw_stacked(rows: Mapping[str, Mapping[str, float]], colours: Mapping[str, str], title: str) -> str:
    """Returns an SVG with one horizontal bar per run, stacked from named parts."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0], 1.2 + 0.45 * len(rows)), layout="constrained")
        axes = figure.subplots()
        names = list(rows)[::-1]
        left = np.zeros(len(names))
        for part, colour in colours.items():
            widths = np.array([rows[name].get(part, 0.0) for name in names])
            axes.barh(range(len(names)), widths, left=left, color=colour, height=0.6)
            left += widths
        axes.set(title=title)
        axes.set_yticks(range(len(names)), [name if len(name) <= 20 else f"…{name[-19:]}" for name in names])
        axes.margins(x=0.02)
        return page_svg(figure)


def plot_bars(axes: Axes, values: Mapping[str, float], colours: Mapping[str, str], title: str) -> None:
    """Draws horizontal bars from 0 to 1, the first on top, each with its value."""
    names = list(values)[::-1]
    axes.barh(names, [values[name] for name in names], color=[colours[name] for name in names])
    for place, name in enumerate(names):
        axes.text(values[name] + 0.01, place, f"{values[name]:.3f}", va="center", fontsize=9)
    axes.set(title=title, xlim=(0, 1.12), xticks=[0, 0.25, 0.5, 0.75, 1])


def page_svg(figure: Figure) -> str:
    """Returns an SVG element for a page: scaled to its container, transparent, text in the page's colour."""
    svg = _svg(figure, transparent=True).replace(TEXT, "currentColor")
    return re.sub(r"^<svg[^>]*>", lambda tag: re.sub(r' (width|height)="[^"]*"', "", tag[0]), svg)


def file_svg(figure: Figure) -> str:
    """Returns an SVG for a separate file: dark text on white."""
    return _svg(figure, transparent=False).replace(TEXT, "#222222")


IMAGES = (".svg", ".png", ".pdf")
"""Extensions of the files that `file_image` can write."""


def file_image(figure: Figure, extension: str) -> bytes:
    """Returns the content of a separate file in the format of its extension, one of IMAGES: dark text on white."""
    if extension == ".svg":
        return file_svg(figure).encode()
    buffer = io.BytesIO()
    stable = {"CreationDate": None} if extension == ".pdf" else {"Software": None}
    figure.savefig(buffer, format=extension[1:], dpi=200, metadata=stable)
    return buffer.getvalue()


def _svg(figure: Figure, *, transparent: bool) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
