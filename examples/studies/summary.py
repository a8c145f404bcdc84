"""Prints Markdown tables of a scored study, and draws a plot.

    summary.py TABLE.csv AXIS OUT.svg            a row per choice of AXIS: means over the seeds, their range in brackets
    summary.py TABLE.csv AXIS --show METRIC ...  the same for these metrics
    summary.py TABLE.csv AXIS --by OTHER METRIC  a row per choice of AXIS, a column per choice of OTHER: means of METRIC

The plot has a line per choice with a point per temperature: the share of right answers (x) and the share of answers
that are right and in the preferred style (y).
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd

TEMPERATURES = ("0", "0.5", "1")
COLUMNS = {
    "score/t0_accuracy": "right, T=0",
    "score/t0_win": "win, T=0",
    "score/t1_accuracy": "right, T=1",
    "score/t1_win": "win, T=1",
    "score/kl": "KL",
    "eval/spo/chosen_shift": "d log p chosen",
    "eval/spo/rejected_shift": "d log p rejected",
    "eval/rewards/accuracies": "pairs ranked right",
}


def markdown(table: pd.DataFrame, axis: str, columns: Mapping[str, str]) -> str:
    """Returns a table with a row per choice, in the order of the study; `columns` maps metrics to headings."""
    lines = [f"| {axis} | seeds | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 2) + "|"]
    for choice, rows in table.groupby(axis, sort=False):
        cells = [_cell(rows[key]) for key in columns]
        lines.append(f"| {choice} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def crossed(table: pd.DataFrame, axis: str, by: str, metric: str) -> str:
    """Returns a table with a row per choice of one axis and a column per choice of the other, in the study's order."""
    means = table.pivot_table(index=axis, columns=by, values=metric, sort=False)
    lines = [f"| {axis} | " + " | ".join(map(str, means.columns)) + " |", "|---" * (len(means.columns) + 1) + "|"]
    lines += [f"| {choice} | " + " | ".join(f"{value:.2f}" for value in row) + " |" for choice, row in means.iterrows()]
    return "\n".join(lines)


def _cell(values: pd.Series) -> str:
    digits = 1 if values.abs().max() >= 10 else 2
    low, high, mean = (f"{value:.{digits}f}" for value in (values.min(), values.max(), values.mean()))
    return mean if low == high else f"{mean} [{low}, {high}]"


def draw(table: pd.DataFrame, axis: str, out: Path) -> None:
    """Draws one line per choice, from temperature 0 (the marker) to 1."""
    mpl.rcParams["svg.fonttype"] = "none"
    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for i, (choice, rows) in enumerate(table.groupby(axis, sort=False)):
        right, win = ([rows[f"score/t{t}_{name}"].mean() for t in TEMPERATURES] for name in ("accuracy", "win"))
        colour = colours[i % len(colours)]
        axes.plot(right, win, color=colour, linewidth=1.4, label=str(choice))
        axes.plot(right[:1], win[:1], "o", color=colour, markersize=4)
    axes.set(xlabel="right", ylabel="right and in the preferred style", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("axis")
    parser.add_argument("picture", type=Path, nargs="?")
    parser.add_argument("--show", nargs="+", metavar="METRIC")
    parser.add_argument("--by", nargs=2, metavar=("OTHER", "METRIC"))
    options = parser.parse_args()
    table = pd.read_csv(options.table)
    table = table[table["state"] == "done"]
    columns = {key: key for key in options.show or ()} or {key: COLUMNS[key] for key in COLUMNS if key in table}
    print(crossed(table, options.axis, *options.by) if options.by else markdown(table, options.axis, columns))
    if options.picture:
        draw(table, options.axis, options.picture)


if __name__ == "__main__":
    main()
