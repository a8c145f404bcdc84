"""The figures of the examples and of docs/layouts.md are those of the planner, and their layouts are its best."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_spo.planner.gpus import GIB
from megatron_spo.planner.layouts import Plan, PlannedRun, plan_layout, ranked
from megatron_spo.planner.options import Options
from megatron_spo.planner.plan import planned_run
from megatron_spo.planner.tables import run_hours
from tests.support.processes import ROOT

MARGIN = 0.85
"""Fraction of the memory that a layout of the examples may use: nothing was measured on a GPU yet."""
ASSUMED = {"llama3_70b": (None, None, None), "ultrafeedback_8b": (150, 250, 61_000)}
"""Prompt tokens, response tokens and pairs that the example's README gives to `plan`."""
BASE = "parallel.tensor=8 parallel.pipeline=2 parallel.virtual_pipeline=null"


@cache
def planned(example: str, gpus: int, gpu: str, overrides: str) -> tuple[PlannedRun, Plan]:
    prompt, response, pairs = ASSUMED[example]
    values: dict[str, Any] = dict.fromkeys(Options.__dataclass_fields__)
    values |= {"config": str(ROOT / "examples" / example / "config.yaml"), "overrides": overrides.split()}
    values |= {"gpus": gpus, "gpu": gpu.lower(), "gpu_changes": {}, "top": 1}
    values |= {"prompt_tokens": prompt, "response_tokens": response, "pairs": pairs}
    job, _ = planned_run(Options(**values))
    return job, plan_layout(job, job.config.parallel)


def row_of_example(example: str, cells: list[str]) -> list[str]:
    """The row that the planner gives for the overrides and the GPUs in a row of an example's README."""
    gpus, gpu = cells[1].split()
    job, plan = planned(example, int(gpus), gpu, " ".join(re.findall(r"`([^`]+)`", cells[0])))
    assert plan.memory and plan.speed
    hours = run_hours(job, plan)
    memory = f"{plan.memory.total / GIB:.0f} of {job.gpu.memory / GIB:.0f}"
    times = [f"{plan.speed.step.total:.2f}", f"{plan.speed.pairs:.0f}", f"{hours:.2f} h", f"{hours * job.gpus:.1f}"]
    return [*cells[:2], memory, *times]


def row_of_layouts(cells: list[str]) -> list[str]:
    """The row that the planner gives for a change in the table of docs/layouts.md."""
    change = ", ".join(re.findall(r"`([^`]+)`", cells[0]))
    overrides = " ".join(
        f"parallel.{one.removeprefix('parallel.').replace(': ', '=')}" for one in change.split(", ") if one
    )
    job, plan = planned("llama3_70b", 32, "H100", f"{BASE} {overrides}")
    assert plan.memory and plan.speed
    fits = "" if plan.fits else ": does not fit"
    return [*cells[:2], f"{plan.speed.step.total:.2f}", f"{plan.memory.total / GIB:.1f}{fits}"]


def differing(page: Path, head: str, expected: Callable[[list[str]], list[str]]) -> list[str]:
    """Returns the rows, as they should be, of the table with this head that differ from the planner's."""
    table = page.read_text().partition(head)[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) >= 2
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [" | ".join(expected(row)) for row in rows if expected(row) != row]


@pytest.mark.parametrize("example", ASSUMED)
def test_the_figures_of_the_examples(example: str) -> None:
    page = ROOT / "examples" / example / "README.md"
    assert not differing(page, "| change | GPUs |", lambda cells: row_of_example(example, cells))


def test_the_figures_of_the_settings() -> None:
    assert not differing(ROOT / "docs/layouts.md", "| change from TP8 SP PP2 DP2 |", row_of_layouts)


@pytest.mark.parametrize(
    ("example", "gpus", "script"), [("llama3_70b", 32, "spo_70b.sh"), ("ultrafeedback_8b", 8, "spo_8b_single_node.sh")]
)
def test_the_layout_is_the_best_with_a_margin(example: str, gpus: int, script: str) -> None:
    job, own = planned(example, gpus, "h100", "")
    fitting, _ = ranked(job)
    safe = [plan for plan in fitting if plan.memory and plan.memory.total <= MARGIN * job.gpu.memory]
    assert own.parallel == safe[0].parallel
    layout = re.search(r"SPO_LAYOUT=([^}]*)}", (ROOT / "slurm" / script).read_text())
    assert layout
    neutral = "parallel.tensor=1 parallel.pipeline=1 parallel.virtual_pipeline=null parallel.sequence=false"
    assert planned(example, gpus, "h100", f"{neutral} {layout[1]}")[1].parallel == own.parallel
