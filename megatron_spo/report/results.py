"""Computes the numbers of a report: runs grouped over seeds, their last metrics and their speed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.special import stdtrit

from megatron_spo.report.runs import Run, is_number

PARTS = ("data", "forward_backward", "communication", "optimizer", "other")
"""Parts of a step's time, `seconds/PART` in metrics.jsonl."""


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    name: str
    runs: dict[str, Run]

    @property
    def state(self) -> str:
        """The different states of its runs."""
        return ", ".join(dict.fromkeys(run.state for run in self.runs.values()))

    @property
    def eval_sets(self) -> list[str]:
        """Names of the held-out sets of its runs."""
        return list(dict.fromkeys(name for run in self.runs.values() for name in run.eval_sets))


def group_runs(runs: dict[str, Run]) -> list[Group]:
    """Returns groups in the order of their first runs; a run without a configuration forms its own group."""
    members: dict[object, dict[str, Run]] = {}
    for name, run in runs.items():
        members.setdefault(run.group or name, {})[name] = run
    groups: list[Group] = []
    for group in members.values():
        name = _common_name(list(group))
        taken = any(name == one.name for one in groups)
        groups.append(Group(f"{next(iter(group))} ({len(group)} seeds)" if taken else name, group))
    return groups


def _common_name(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    start = os.path.commonprefix(names).rstrip("0123456789").removesuffix("seed").rstrip("-_./ s")
    return f"{start or names[0]} ({len(names)} seeds)"


def summary(values: Sequence[float]) -> str:
    """Returns a number as text; for several runs, the mean ± half of its 95% interval (Student's t over the runs)."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.4g}"
    factor = float(stdtrit(len(values) - 1, 0.975))  # Student's t, two-sided 95%
    return f"{mean(values):.4g} ± {factor * stdev(values) / len(values) ** 0.5:.2g}"


def last_values(group: Group, data: str | None, metric: str) -> list[float]:
    """Returns a metric from each run's last line for a held-out set, or for training (None)."""
    lines = [run.last(data) for run in group.runs.values()]
    return [line[metric] for line in lines if is_number(line.get(metric))]


def seconds_by_part(run: Run) -> dict[str, float]:
    """Returns the mean seconds per step by part, without the first line (warm-up); empty if they were not measured."""
    lines = run.of(None)[1:] or run.of(None)
    measured = {part: [line[f"seconds/{part}"] for line in lines if f"seconds/{part}" in line] for part in PARTS}
    return {part: mean(values) for part, values in measured.items() if values}


def speed_row(run: Run) -> list[str]:
    """Returns table cells: seconds per step, tokens and pairs per second, and the share of each part."""
    lines = [line for line in run.of(None)[1:] or run.of(None) if line.get("seconds")]
    if not lines:
        return []
    seconds = sum(line["seconds"] for line in lines)
    rates = [sum(line.get(key, 0) for line in lines) / seconds for key in ("tokens", "pairs")]
    parts = seconds_by_part(run)
    whole = sum(parts.values())
    shares = [f"{parts[part] / whole:.0%}" if part in parts and whole else "" for part in PARTS]
    return [f"{seconds / len(lines):.3g}", *(f"{rate:.4g}" for rate in rates), *shares]
