"""Makes the table and the picture from the result files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from examples.common import write_text
from examples.gsm8k.study import CONTROL, LONGER, LOSSES, SAMPLING_TEMPERATURE, SCHEDULES, all_runs
from megatron_spo.evaluate.scores import Estimate, difference, estimate
from megatron_spo.report import figures

Result = Mapping[str, Any]
"""The content of a result file."""
BASE = "base"
COLOURS = {CONTROL: "#8a8f98", "dpo": "#3b82c4", "simpo": "#cf6a28", "alpha_dpo": "#3a9d5d"}


def write(folder: Path) -> str:
    """Writes FOLDER/table.md and FOLDER/runs.svg; returns the tables."""
    base, groups = read(folder)
    text = tables(base, groups)
    write_text(folder / "table.md", text + "\n")
    with matplotlib.rc_context(figures.STYLE):
        figure, (left, right) = figures.new_figure(2)
        figure.set_size_inches(2 * figures.SIZE[0], 1.6 + 0.24 * (len(groups) + 1))
        rows = {BASE: [base], **{f"{name}, lr {rate(lr)}": ones for (name, lr), ones in groups.items()}}
        plot_accuracy(left, rows)
        plot_shifts(right, rows)
        write_text(folder / "runs.svg", figures.file_svg(figure))
    return text


def read(folder: Path) -> tuple[Result, dict[tuple[str, float], list[Result]]]:
    """Returns the result of the base, and by method and learning rate those of the seeds, similar runs together."""
    groups: dict[tuple[str, float], list[Result]] = {}
    for run in all_runs():
        path = folder / f"{run.key}.json"
        if path.is_file():
            groups.setdefault((run.name, float(run.lr)), []).append(json.loads(path.read_text()))
    ordered = sorted(groups, key=lambda key: (key[1], order(key[0])))
    return json.loads((folder / f"{BASE}.json").read_text()), {key: groups[key] for key in ordered}


def order(name: str) -> tuple[int, int]:
    """Returns the place of a method among those of a learning rate: the control, then loss after loss."""
    loss, mark, rest = name.partition("+")
    return list(LOSSES).index(loss) if loss in LOSSES else -1, list(SCHEDULES).index(mark + rest)


def rate(lr: float) -> str:
    """Returns a learning rate as one writes it: 5e-6."""
    return f"{lr:g}".replace("e-0", "e-")


def tables(base: Result, groups: Mapping[tuple[str, float], Sequence[Result]]) -> str:
    """Returns the table of all methods, one of answers with a higher limit of tokens, one of the checkpoints of the
    runs that answered problems during training, and one of the alarms of every run."""
    runs = [one for ones in groups.values() for one in ones]
    limits = [limit_row(one) for one in (base, *runs) if "longer" in one["answers"]]
    traces = [row for one in runs if one.get("during") for row in trace(one, base)]
    alarms = [alarm_row(one) for one in sorted(runs, key=lambda one: chosen_shift(one["held_out"][-1]))]
    return "\n\n".join([table(base, groups), *(markdown(rows) for rows in (limits, traces, alarms) if rows)])


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def label(one: Result) -> str:
    """Returns the name of one run, with learning rate and seed."""
    return f"{one['name']}, lr {rate(one['lr'])}, seed {one['seed']}" if "lr" in one else BASE


def alarm_row(one: Result) -> dict[str, str]:
    """Returns the cells of a run's alarms: the first step of each, on training batches and on held-out pairs."""
    first: dict[tuple[bool, str], int] = {}
    for alarm in one["alarms"]:
        first.setdefault((alarm["data"] == "train", alarm["alarm"]), alarm["step"])
    return {
        "run": label(one),
        "chosen, nats per token": f"{chosen_shift(one['held_out'][-1]):+.3f}",
        "displacement": str(first.get((True, "displacement"), "none")),
        "displacement, held-out": str(first.get((False, "displacement"), "none")),
        "both_down": str(first.get((True, "both_down"), "none")),
        "both_down, held-out": str(first.get((False, "both_down"), "none")),
        "accuracy": f"{mean(per_problem([one])):.3f}",
    }


def limit_row(one: Result) -> dict[str, str]:
    """Returns the cells of a run's answers to the same problems with the usual limit of tokens and a higher one."""
    answers = one["answers"]
    count = len(answers["longer"]["right"])
    cells = {"run": label(one), "problems": str(count)}
    for field in ("right", "malformed"):
        cells[field] = str(answers["greedy"][field][:count].count("1"))
        cells[f"{field}, {LONGER} times the tokens"] = str(answers["longer"][field].count("1"))
    return cells


def trace(one: Result, base: Result) -> list[dict[str, str]]:
    """Returns the rows of a run's checkpoints, between those of the base and of the end, all on the same problems."""
    count = len(next(iter(one["during"].values()))["right"])
    before = {"0": base["answers"]["greedy"]}
    after = {str(one["held_out"][-1]["step"]): one["answers"]["greedy"]}
    return [
        {
            "run": f"{one['name']}, lr {rate(one['lr'])}",
            "step": step,
            "problems": str(count),
            "right": str(answers["right"][:count].count("1")),
            "malformed": str(answers["malformed"][:count].count("1")),
            "words": f"{np.mean(answers['words'][:count]):.0f}",
        }
        for step, answers in (before | one["during"] | after).items()
    ]


def table(base: Result, groups: Mapping[tuple[str, float], Sequence[Result]]) -> str:
    """Returns a Markdown table with a row for the base and one for every method and learning rate."""
    rows = [row(BASE, "", [base], base, {})]
    for (name, lr), ones in groups.items():
        loss = name.partition("+")[0]
        others = {"base": [base], "control": groups.get((CONTROL, lr)), "loss alone": groups.get((loss, lr))}
        rows.append(row(name, rate(lr), ones, base, others))
    return markdown(rows)


def row(
    name: str, lr: str, ones: Sequence[Result], base: Result, others: Mapping[str, Sequence[Result] | None]
) -> dict[str, str]:
    """Returns the cells of a row; intervals are 95%, over the problems, after averaging over the seeds.

    `others`: The runs that these are compared with, by the name of the comparison.
    """
    sampled = "sampled" in ones[0]["answers"]
    less = {f"minus {other}": minus(ones, others.get(other)) for other in ("base", "control", "loss alone")}
    cells = {
        "run": name,
        "lr": lr,
        "seeds": str(len(ones)),
        "accuracy": shown(estimate(per_problem(ones))),
        **less,
        f"T={SAMPLING_TEMPERATURE:g}": shown(estimate(per_problem(ones[:1], "sampled"))) if sampled else "",
        "malformed": f"{mean(per_problem(ones, field='malformed')):.2f}",
        "other questions": f"{mean(per_problem(ones, 'other')):.2f}",
        "words": f"{mean(one['answers']['greedy']['words'] for one in ones):.0f}",
    }
    return {**cells, **held_out_cells(ones, base)}


def minus(ones: Sequence[Result], others: Sequence[Result] | None) -> str:
    """Returns the difference in accuracy to other runs, if there are any, with those seeds that both have (the base has
    none)."""
    if not others or ones[0] is others[0]:
        return ""
    common = {one.get("seed") for one in ones} & {one.get("seed") for one in others}
    if common:
        ones, others = ([one for one in runs if one.get("seed") in common] for runs in (ones, others))
    return shown(difference(per_problem(ones), per_problem(others)), "+")


def held_out_cells(ones: Sequence[Result], base: Result) -> dict[str, str]:
    """Returns the cells of the held-out pairs at the end of training, means over the seeds."""
    keys = ("chosen, nats per token", "rejected, nats per token", "both fell", "ranked right", "entropy", "first alarm")
    ends = [one["held_out"][-1] for one in ones if "held_out" in one]
    if not ends:
        return dict.fromkeys(keys, "")
    rejected = base["rejected_tokens"]
    alarms = [one["alarms"][0] for one in ones if one["alarms"]]
    first = ", ".join(f"{alarm['alarm']} at {alarm['step']}" for alarm in alarms[:1])
    values = (
        f"{mean(chosen_shift(end) for end in ends):+.3f}",
        f"{mean(end['spo/rejected_shift'] * end['pairs'] / rejected for end in ends):+.3f}",
        f"{mean(end['spo/both_down'] for end in ends):.2f}",
        f"{mean(end['rewards/accuracies'] for end in ends):.2f}",
        f"{mean(end['policy/entropy'] for end in ends):.2f}",
        f"{first} ({len(alarms)} of {len(ones)} seeds)" if alarms and len(ones) > 1 else first or "none",
    )
    return dict(zip(keys, values, strict=True))


def per_problem(ones: Sequence[Result], kind: str = "greedy", field: str = "right") -> NDArray[np.float64]:
    """Returns the mean over the seeds for each problem."""
    return np.array([[float(digit) for digit in one["answers"][kind][field]] for one in ones]).mean(axis=0)


def chosen_shift(line: Mapping[str, Any]) -> float:
    """Returns the change of log p of the held-out chosen answers, in nats per token."""
    return float(line["spo/chosen_shift"] * line["pairs"] / line["chosen_tokens"])


def mean(values: Iterator[Any] | NDArray[np.float64]) -> float:
    return float(np.mean([np.mean(value) for value in values]))


def shown(found: Estimate | None, sign: str = "") -> str:
    return "" if found is None else f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def plot_accuracy(axes: Any, groups: Mapping[str, Sequence[Result]]) -> None:
    """Draws the accuracy of each group with its 95% interval, one row per group."""
    for place, (name, ones) in enumerate(groups.items()):
        found = estimate(per_problem(ones))
        assert found is not None
        axes.plot([found.low, found.high], [place, place], color=colour(name), linewidth=2)
        axes.plot(found.value, place, **point(name))
    axes.set_yticks(range(len(groups)), list(groups), fontsize=9)
    axes.set(title="Accuracy on held-out problems, 95%", xlim=(0, None))
    finish(axes)


def plot_shifts(axes: Any, groups: Mapping[str, Sequence[Result]]) -> None:
    """Draws the change of log p of the held-out chosen answers in the same rows, a point per seed."""
    for place, (name, ones) in enumerate(groups.items()):
        shifts = [chosen_shift(one["held_out"][-1]) if "held_out" in one else 0.0 for one in ones]
        axes.plot(shifts, [place] * len(shifts), linestyle="none", **point(name))
    axes.set_yticks(range(len(groups)), [])
    axes.set(title="Change of log p(chosen), nats per token")
    finish(axes)


def finish(axes: Any) -> None:
    axes.invert_yaxis()  # the first row is at the top
    axes.grid(alpha=0.2)


def point(name: str) -> dict[str, str]:
    """Returns the marker of a row: filled with an SFT term besides the preference loss."""
    return {"marker": "o", "color": colour(name), "fillstyle": "full" if "+" in name else "none"}


def colour(name: str) -> str:
    return COLOURS.get(name.partition(",")[0].partition("+")[0], figures.TEXT)
