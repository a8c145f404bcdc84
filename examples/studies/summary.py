"""Table and picture of a scored study: `summary.py TABLE.csv AXIS OUT.svg` prints Markdown, a row a choice of AXIS.

Numbers are means over the seeds, with the range over them in brackets. The picture has a line a choice, a point a
temperature: how often the answer is right, and how often it is right and in the preferred style.
"""

import sys
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


def markdown(table: pd.DataFrame, axis: str) -> str:
    """A row a choice, in the order of the study."""
    columns = {key: name for key, name in COLUMNS.items() if key in table}
    lines = [f"| {axis} | seeds | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 2) + "|"]
    for choice, rows in table.groupby(axis, sort=False):
        cells = [_cell(rows[key]) for key in columns]
        lines.append(f"| {choice} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: pd.Series) -> str:
    digits = 1 if values.abs().max() >= 10 else 2
    low, high, mean = (f"{value:.{digits}f}" for value in (values.min(), values.max(), values.mean()))
    return mean if low == high else f"{mean} [{low}, {high}]"


def draw(table: pd.DataFrame, axis: str, out: Path) -> None:
    """One line a choice, from temperature 0 (the marker) to 1."""
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
    table = pd.read_csv(sys.argv[1])
    table = table[table["state"] == "done"]
    print(markdown(table, sys.argv[2]))
    if "score/t0_win" in table:
        draw(table, sys.argv[2], Path(sys.argv[3]))


if __name__ == "__main__":
    main()
