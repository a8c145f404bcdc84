"""Writes the quickstart's page and figure; every sentence about the result is computed from the numbers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from examples.common import metrics_lines, read_jsonl, write_text
from examples.quickstart import task
from megatron_spo.report import figures
from megatron_spo.report.figures import Curve
from megatron_spo.report.page import legend, paragraph, section, table
from megatron_spo.report.page import write_page as write_html

Row = Mapping[str, Any]
"""A row of results.json."""
HEADERS = {
    "name": "run",
    "accuracy": "accuracy, greedy",
    "accuracy_t1": "accuracy, T=1",
    "malformed": "malformed, T=1",
    "preferred": "short style, T=1",
    "win": "win, T=1",
    "chosen_shift": "log p(chosen), change",
    "rejected_shift": "log p(rejected), change",
    "seconds": "training, s",
}
COLOURS = {
    "sft": "#8a8f98",
    "sft_on_chosen": "#555b66",
    "dpo": "#3b82c4",
    "simpo": "#e07b39",
    "alpha_dpo": "#3a9d5d",
}
BARS = {
    "accuracy": "Accuracy, greedy",
    "win": "Win at T=1: right and preferred",
    "malformed": "Malformed at T=1",
}
SHIFTS = {
    "spo/chosen_shift": "Change of log p(chosen), nats",
    "spo/rejected_shift": "Change of log p(rejected), nats",
}
ABOUT = (
    "Three-digit addition with a worked scratchpad, in a long and a short style. sft is the model that all "
    "runs start from. The pairs were sampled from it: both responses right, one in each style; the judge "
    "prefers the short one in 75%. sft_on_chosen, the control, is plain SFT on the chosen responses. A win "
    "is a response that is right and short. Log-prob changes are means over held-out pairs, in nats per response; "
    "scores are means over held-out problems."
)


def write_page(out: Path, rows: Sequence[Row]) -> list[str]:
    """Writes OUT/index.html; returns its sentences about the result."""
    sentences = verdict(rows, {row["name"]: greedy_win(out, row["name"]) for row in rows})
    colours = {row["name"]: colour(row["name"]) for row in rows}
    bars = [
        figures.draw_bars({row["name"]: row[column] for row in rows}, colours, title) for column, title in BARS.items()
    ]
    curves = [figures.draw_curves(shift_curves(out, rows, metric), title) for metric, title in SHIFTS.items()]
    parts = [
        paragraph(ABOUT),
        section("Results", *map(paragraph, sentences)),
        section("Table", table(list(HEADERS.values()), [table_row(row) for row in rows])),
        section("Responses to held-out problems", *bars, grid=True),
        section("Log-probs of held-out pairs (dashed: without SPO)", legend(colours), *curves, grid=True),
    ]
    write_html(out / "index.html", "SPO quickstart", parts)
    return sentences


def write_picture(out: Path, rows: Sequence[Row]) -> None:
    """Writes OUT/displacement.svg, which shows in two panels what SPO prevents."""
    names = [row["name"] for row in rows]
    with matplotlib.rc_context(figures.STYLE):
        figure, (left, right) = figures.new_figure(2)
        figures.plot_curves(left, shift_curves(out, rows, "spo/chosen_shift"), SHIFTS["spo/chosen_shift"])
        left.legend(fontsize=8, frameon=False)
        accuracy = {name: row["accuracy"] for name, row in zip(names, rows, strict=True)}
        figures.plot_bars(right, accuracy, {name: colour(name) for name in names}, "Accuracy on held-out problems")
        write_text(out / "displacement.svg", figures.file_svg(figure))


def shift_curves(out: Path, rows: Sequence[Row], metric: str) -> list[Curve]:
    """Returns a curve for each run on the pairs, from 0 at step 0; runs without SPO are dashed."""
    curves = []
    for name in (row["name"] for row in rows):
        points = [(line["step"], line[metric]) for line in metrics_lines(out / name, "eval") if metric in line]
        if points:
            curves.append(Curve(name, colour(name), [(0, 0.0), *points], dashed=name in bases(rows)))
    return curves


def colour(name: str) -> str:
    """Returns the colour of a run: one per loss, paler without SPO."""
    loss = name.removesuffix("+spo")
    return COLOURS[loss] if loss != name or loss.startswith("sft") else COLOURS[loss] + "99"


def bases(rows: Sequence[Row]) -> list[str]:
    """Returns the losses that were run without and with SPO."""
    names = [row["name"] for row in rows]
    return [name for name in names if f"{name}+spo" in names]


def greedy_win(out: Path, name: str) -> float:
    """Returns the share of greedy responses that are right and in the preferred style."""
    return task.score(read_jsonl(out / f"{name}-greedy.jsonl")).win


def table_row(row: Row) -> list[str]:
    """Returns the table cells of one row."""
    digits = {"chosen_shift": "+.1f", "rejected_shift": "+.1f", "seconds": ".0f"}
    return [row["name"], *(format(row[key], digits.get(key, ".3f")) for key in HEADERS if key != "name")]


def verdict(rows: Sequence[Row], greedy_wins: Mapping[str, float]) -> list[str]:
    """Returns sentences that state what the numbers show."""
    by_name = {row["name"]: row for row in rows}
    base, control = bases(rows), "sft_on_chosen"
    spo = [f"{name}+spo" for name in base]

    def listed(names: Sequence[str], values: Callable[[str], float]) -> str:
        return ", ".join(f"{name} {values(name):.3f}" for name in names)

    def ahead(rivals: Sequence[str]) -> str:
        won = [name for name, rival in zip(spo, rivals, strict=True) if win(name) > win(rival)]
        return "all of them" if won == spo else ", ".join(won) or "none of them"

    def accuracy(name: str) -> float:
        return float(by_name[name]["accuracy"])

    def win(name: str) -> float:
        return float(by_name[name]["win"])

    best = max(spo, key=accuracy)
    colder = " For the control, a lower temperature also leads to the preferred style."
    colder = colder if greedy_wins[control] > win(control) else ""
    stays = "above" if accuracy(control) > accuracy(best) else "not above"
    return [
        f"Greedy accuracy before: {accuracy('sft'):.3f}. After: without SPO {listed(base, accuracy)}; with "
        f"SPO {listed(spo, accuracy)}.",
        f"Wins at T=1: without SPO {listed(base, win)}; with SPO {listed(spo, win)}; the control "
        f"{win(control):.3f}. With SPO, {ahead(base)} win more than the loss alone, and "
        f"{ahead([control] * len(spo))} more than the control.",
        f"The control's greedy accuracy is {accuracy(control):.3f}, {stays} the best with SPO ({best}, "
        f"{accuracy(best):.3f}).",
        f"Decoded greedily, the control wins {greedy_wins[control]:.3f}, and with SPO "
        f"{listed(spo, lambda name: greedy_wins[name])}.{colder}",
        "One small model, one seed: this shows the mechanism, but not its size for other models.",
    ]
