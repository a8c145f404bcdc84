"""Runs training on one GPU and measures its steps; shared by gpu.py and gpu_check.py."""

import contextlib
import gc
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_parts
import measure
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_spo.planner.gpus import GIB
from megatron_spo.train.run_directory import RunDirectory

STEPS, SYNCS_AT, PROFILED = 10, 3, 4
"""Number of steps; those in which syncs are counted and kernels are profiled; later steps are timed."""


@dataclass
class Observed:
    """Measurements of a run: seconds per timed step, syncs in a step, microseconds by kind of kernel, peak bytes."""

    seconds: list[float]
    syncs: int
    kernels: dict[str, float] = field(default_factory=dict)
    peak: float = 0.0

    @property
    def step(self) -> float:
        return statistics.median(self.seconds)


def observe(config: Path, output: Path, *overrides: str) -> Observed:
    """Runs `megatron-spo train`; counts syncs in one step, profiles kernels in the next, and times the others."""
    on_gpu = torch.cuda.is_available()
    recorder = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
    log, seconds, syncs, peak = RunDirectory.log, [], 0, 0.0
    said: list[str] = []

    def after_step(self: RunDirectory, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        nonlocal syncs, peak
        peak = max(peak, metrics.get("memory/allocated", 0.0))
        log(self, kind, step, metrics)
        if step == SYNCS_AT - 1 and on_gpu:
            said.clear()
            torch.cuda.set_sync_debug_mode("warn")
        if step == SYNCS_AT:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
            syncs = sum("synchroniz" in text for text in said)
            recorder.start()
        if step == PROFILED:
            recorder.stop()
        if step > PROFILED:
            seconds.append(metrics["seconds"])

    with contextlib.ExitStack() as stack:
        stack.enter_context(measure.replaced(RunDirectory, "log", after_step))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        stack.enter_context(measure.replaced(warnings, "showwarning", lambda message, *_: said.append(str(message))))
        measure.command("train", str(config), f"output={output}", *overrides)
    kernels = gpu_parts.by_kind(recorder.key_averages(), on_gpu=on_gpu)
    return Observed(seconds, syncs, kernels, peak * GIB)


def free() -> None:
    """Frees memory that earlier parts held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
