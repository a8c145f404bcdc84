"""Pictures as SVG text: they follow the page's text colour, so they are readable on light and dark."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_spo.report.runs import Points

PALETTE = (
    "#3b82c4",
    "#e07b39",
    "#3a9d5d",
    "#c44e52",
    "#8f6bb8",
    "#a07855",
    "#d174ae",
    "#7f8c8d",
    "#a5a532",
    "#2aa9b8",
)
TEXT = "#010203"  # stands for the page's text colour until the SVG is written
SIZE = (5.2, 3.3)  # inches; small, so that the lettering stays readable when a phone scales the picture down
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron-spo",  # the same picture gives the same bytes
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": TEXT,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
}


@dataclass(frozen=True)
class Curve:
    """`faint` curves lie behind the others."""

    label: str
    colour: str
    points: Points
    faint: bool = False
    dashed: bool = False


def run_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each run."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def draw_curves(curves: Sequence[Curve], title: str, *, labelled: bool = False) -> str:
    """SVG of curves over optimizer steps; `labelled` writes the names into the picture."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(title)
        for curve in curves:
            steps, values = zip(*curve.points, strict=True)
            axes.plot(
                steps,
                values,
                color=curve.colour,
                label=None if curve.faint else curve.label,
                alpha=0.25 if curve.faint else 1,
                linewidth=1 if curve.faint else 1.8,
                linestyle="--" if curve.dashed else "-",
                marker="o" if len(steps) == 1 else None,
            )
        axes.set_xlabel("step")
        if labelled:
            axes.legend(fontsize=8, frameon=False)
        return to_svg(figure)


def draw_bars(values: Mapping[str, float], colours: Mapping[str, str], title: str) -> str:
    """SVG of one horizontal bar a run, from 0 to 1, with its value."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(title)
        names = list(values)[::-1]
        axes.barh(names, [values[name] for name in names], color=[colours[name] for name in names])
        for place, name in enumerate(names):
            axes.text(values[name] + 0.01, place, f"{values[name]:.3f}", va="center", fontsize=9)
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        return to_svg(figure)


def new_figure(title: str) -> tuple[Figure, Axes]:
    """A figure with one titled pair of axes."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    return figure, axes


def to_svg(figure: Figure) -> str:
    """SVG element for a page: as wide as its place, transparent, lettering in the page's colour."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(TEXT, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1),
        count=1,
    )
