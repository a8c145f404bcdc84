"""Formats the results of the planner as text and as plain data."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tabulate import tabulate

from megatron_spo.config.schema import ParallelConfig
from megatron_spo.planner.gpus import GIB
from megatron_spo.planner.layouts import Plan, PlannedRun
from megatron_spo.planner.rows import steps_in

SHOWN_FAILURES = 5
TIGHT = 0.95
"""Fraction of the GPU memory above which a plan may fail because of the assumed reserved memory."""


def describe(parallel: ParallelConfig) -> str:
    """Returns a short name of a layout, such as TP8 SP PP2."""
    axes = {
        "PP": parallel.pipeline,
        "VPP": parallel.virtual_pipeline or 1,
        "CP": parallel.context,
        "EP": parallel.expert,
    }
    parts = [f"TP{parallel.tensor}", *(["SP"] if parallel.sequence else [])]
    return " ".join(parts + [f"{axis}{size}" for axis, size in axes.items() if axis == "PP" or size > 1])


def as_overrides(parallel: ParallelConfig) -> str:
    """Returns the layout as command-line overrides."""
    return " ".join(
        f"parallel.{key}={'true' if value is True else value}"
        for key, value in parallel.model_dump().items()
        if value not in (None, False, "none") and (value != 1 or isinstance(value, bool))
    )


def steps_of(job: PlannedRun) -> int:
    """Returns the number of optimizer steps of the run."""
    return steps_in(job.config, len(job.lengths))


def as_text(
    job: PlannedRun,
    own: Plan,
    fitting: Sequence[Plan],
    others: Sequence[Plan],
    *,
    notes: Sequence[str],
    price: float | None,
) -> str:
    """Returns the table for the terminal."""
    blocks = [_heading(job, notes), _table(job, own, fitting, price)]
    detailed = own if own.memory else fitting[0] if fitting else None
    if detailed is not None:
        blocks.append(_parts(job, detailed, "the configured layout" if detailed is own else "the fastest"))
    if own.problems:
        blocks.append("the configured layout cannot run:\n" + "\n".join(f"  {problem}" for problem in own.problems))
    if others:
        lines = [f"  {describe(plan.parallel)}: {plan.problems[0]}" for plan in others[:SHOWN_FAILURES]]
        more = f"\n  and {len(others) - SHOWN_FAILURES} more" if len(others) > SHOWN_FAILURES else ""
        blocks.append("do not fit even with full recomputation:\n" + "\n".join(lines) + more)
    if fitting:
        blocks.append(f"the fastest: {as_overrides(fitting[0].parallel)}")
    return "\n\n".join(blocks)


def _heading(job: PlannedRun, notes: Sequence[str]) -> str:
    gpu, lengths = job.gpu, job.lengths
    tokens = lengths.tokens
    spread = ", ".join(f"{int(np.quantile(tokens, q))}" for q in (0.5, 0.95, 1.0))
    lines = [
        f"{job.gpus} x {gpu.name}, {gpu.memory / GIB:.1f} GiB each; {job.shape.family} of {job.shape.layers} layers, "
        f"{job.config.precision.fp8 or job.config.precision.dtype}",
        f"{len(lengths)} pairs, lengths {'; '.join(notes)}",
        f"packed tokens of a pair: {spread} (median, 95th percentile, maximum); rows of {job.config.data.longest_row}",
        f"computed, not measured; calibration: products reach {gpu.efficiency:.1%} of the peak, from {gpu.source}",
    ]
    return "\n".join(lines)


def _table(job: PlannedRun, own: Plan, fitting: Sequence[Plan], price: float | None) -> str:
    head = ["layout", "recompute", "DP", "GiB", "s/step", "pairs/s", "tokens/s/GPU", "MFU", "run h", "GPU h"]
    rows = [[*head, *(["cost"] if price is not None else [])]]
    if own.speed:
        rows.append(_row(job, own, "configured: ", price))
    rows += [_row(job, plan, "", price) for plan in fitting]
    if not fitting:
        return (
            "no layout fits on these GPUs; use more GPUs or GPUs with more memory, or set a shorter data.row_length "
            "or lora.rank"
        )
    sides = ["left", "left", *["right"] * (len(rows[0]) - 2)]
    table = tabulate(rows, tablefmt="plain", colalign=sides, disable_numparse=True)
    tight = any(is_tight(job, plan) for plan in [own, *fitting])
    legend = (
        [f"~ more than {TIGHT:.0%} of the memory: may not fit, because the reserved memory is an assumption"]
        if tight
        else []
    )
    return "\n".join([table, *legend])


def _row(job: PlannedRun, plan: Plan, prefix: str, price: float | None) -> list[str]:
    assert plan.memory and plan.speed
    ranks = plan.parallel.tensor * plan.parallel.pipeline * plan.parallel.context
    hours = run_hours(job, plan)
    return [
        prefix + describe(plan.parallel),
        plan.parallel.recompute,
        str(job.gpus // ranks),
        f"{plan.memory.total / GIB:.1f}" + (" !" if not plan.fits else " ~" if is_tight(job, plan) else ""),
        f"{plan.speed.step.total:.3g}",
        f"{plan.speed.pairs:.3g}",
        f"{plan.speed.tokens:.0f}",
        f"{plan.speed.utilisation:.1%}",
        f"{hours:.3g}",
        f"{hours * job.gpus:.3g}",
        *([f"{hours * job.gpus * price:.4g}"] if price is not None else []),
    ]


def is_tight(job: PlannedRun, plan: Plan) -> bool:
    """Returns whether a plan fits but uses almost all memory."""
    return plan.fits and plan.memory is not None and plan.memory.total > TIGHT * job.gpu.memory


def run_hours(job: PlannedRun, plan: Plan) -> float:
    """Returns the hours of training and, with a cache, of the reference pass, without evaluation, loading, saving."""
    assert plan.speed
    seconds = steps_of(job) * plan.speed.step.total
    if job.config.reference.cache is not None:
        seconds += plan.speed.reference * len(job.lengths) / job.config.training.global_batch_size
    return seconds / 3600


def duration(hours: float) -> str:
    """Returns a time in hours or minutes."""
    minutes = 60 * hours
    return f"{hours:.1f} h" if minutes >= 100 else f"{minutes:.0f} minutes" if minutes >= 1.5 else "about a minute"


def _parts(job: PlannedRun, plan: Plan, name: str) -> str:
    assert plan.memory and plan.speed and plan.longest
    sizes = ", ".join(f"{part} {size / GIB:.2f}" for part, size in vars(plan.memory).items() if size)
    times = ", ".join(f"{part} {seconds:.3g}" for part, seconds in vars(plan.speed.step).items() if seconds)
    reference = ""
    if job.config.reference.cache is not None:
        hours = plan.speed.reference * len(job.lengths) / job.config.training.global_batch_size / 3600
        reference = f"\n  reference pass: {hours:.3g} h once, {hours * job.gpus:.3g} GPU h"
    return (
        f"{name}, {describe(plan.parallel)}, per GPU:\n"
        f"  GiB on stage {plan.stage}, {plan.rows} rows of up to {plan.longest.tokens} tokens: {sizes}\n"
        f"  seconds of a step: {times}; rows {plan.speed.fill:.0%} full; {steps_of(job)} steps" + reference
    )


def as_json(
    job: PlannedRun,
    own: Plan,
    fitting: Sequence[Plan],
    others: Sequence[Plan],
    *,
    notes: Sequence[str],
    price: float | None,
) -> dict[str, Any]:
    """Returns all results as plain data, in bytes and seconds."""
    tokens = job.lengths.tokens
    return {
        "gpu": vars(job.gpu),
        "gpus": job.gpus,
        "model": {key: value for key, value in asdict(job.shape).items() if key != "raw"},
        "pairs": len(job.lengths),
        "lengths": {"source": job.lengths.source, "mean": float(tokens.mean()), "longest": int(tokens.max())},
        "notes": list(notes),
        "steps": steps_of(job),
        "configured": _plain(job, own, price),
        "fitting": [_plain(job, plan, price) for plan in fitting],
        "not_fitting": [_plain(job, plan, price) for plan in others],
    }


def _plain(job: PlannedRun, plan: Plan, price: float | None) -> dict[str, Any]:
    result: dict[str, Any] = {
        "parallel": plan.parallel.model_dump(),
        "fits": plan.fits,
        "problems": list(plan.problems),
    }
    if plan.memory and plan.speed and plan.longest:
        hours = run_hours(job, plan)
        result |= {
            "memory": {**vars(plan.memory), "total": plan.memory.total, "stage": plan.stage},
            "tight": is_tight(job, plan),
            "rows_per_rank": plan.rows,
            "longest_row": plan.longest.tokens,
            "step_seconds": {**vars(plan.speed.step), "total": plan.speed.step.total},
            "pairs_per_second": plan.speed.pairs,
            "tokens_per_second_per_gpu": plan.speed.tokens,
            "model_flops_utilisation": plan.speed.utilisation,
            "row_fill": plan.speed.fill,
            "hours": hours,
            "gpu_hours": hours * job.gpus,
        }
        if price is not None:
            result["cost"] = hours * job.gpus * price
    return result
