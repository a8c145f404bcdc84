"""The table before the start of a study: size, data, operations and time of each run, by the planner."""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tabulate import tabulate

from megatron_spo.config.load import load_config
from megatron_spo.config.model_shape import ModelShape, read_model_shape
from megatron_spo.config.schema import Config
from megatron_spo.errors import UserError
from megatron_spo.planner.gpus import Gpu, find_gpu
from megatron_spo.planner.layouts import PlannedRun, plan_layout
from megatron_spo.planner.presets import shape_of
from megatron_spo.planner.rows import Lengths, is_at_hand, measured_lengths
from megatron_spo.planner.tables import steps_of
from megatron_spo.scaling.amounts import amount
from megatron_spo.scaling.models import sized_configs
from megatron_spo.scaling.spec import ExpectedSpec
from megatron_spo.scaling.study import Study, StudyRun, varied_names

CPU = "cpu"
"""Name of this machine's processor as a device of the planner."""
CPU_EFFICIENCY = 0.35
"""Share of the rate of a large fp32 matrix product that training of small models reaches."""
CPU_BANDWIDTH = 8e9
"""Assumed memory bandwidth of a core, bytes per second."""
CPU_START = 4.0
"""Assumed seconds until the first step, on a CPU; on GPUs the time to load a model is not included."""
CPU_STEP = 0.02
"""Assumed seconds of a step that do not depend on its size, on a CPU."""
LEGEND = (
    "N: parameters. D: tokens computed in all steps; a pair counts its prompt once and both answers, without padding, "
    "and again in every epoch.\nU: tokens of the different pairs among them. FLOPs: necessary operations, forward and "
    "backward. Time: estimated{device},\nwithout the reference pass, evaluation, and the commands of "
    "`before` and `after`."
)


@dataclass(frozen=True)
class Estimate:
    """What a run will need.

    Attributes:
        n: Parameters.
        d: Computed tokens without padding, over all steps.
        u: Tokens of the different pairs among them.
        steps: Optimizer steps.
        flops: Necessary operations of all steps.
        hours: Hours of training.
        problem: Why the layout does not run on the device, or empty.
    """

    n: int
    d: float
    u: float
    steps: int
    flops: float
    hours: float
    problem: str = ""


def before_start(
    study: Study, runs: Sequence[StudyRun], name: str | None, gpus: int, *, workers: int, most: int
) -> str:
    """Returns the table of the runs on GPUs of this name; None: on this CPU, unless the machine has GPUs.

    More than `most` runs are only shown as a sum.

    Raises:
        UserError: the name or the number of GPUs is not valid.
    """
    if gpus < 1:
        raise UserError(f"--gpus {gpus} must be at least 1")
    gpu = device(name or ("h100" if shutil.which("nvidia-smi") else CPU), workers)
    found = estimates(study, runs, gpu, gpus)
    hours = sum(one.hours for one in found.values()) / workers
    at_once = f"\nwith {workers} runs at a time: {_time(hours)}" if workers > 1 and found else ""
    return shown(runs, found, gpu, gpus, most) + at_once


def device(name: str, processes: int) -> Gpu:
    """Returns a device of the planner; `cpu` is this machine, shared by processes, with a measured rate of products."""
    if name != CPU:
        return find_gpu(name, {})
    cores = max(1, len(os.sched_getaffinity(0)) // processes)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    matrix = np.ones((768, 768), dtype=np.float32)
    best = 1e9
    with ThreadPoolExecutor(processes) as pool:  # as the runs, which share the cores
        for _ in range(4):
            start = time.perf_counter()
            list(pool.map(matrix.dot, [matrix] * processes))
            best = min(best, time.perf_counter() - start)
    rate, bandwidth = 2 * 768**3 / best, CPU_BANDWIDTH * cores
    return Gpu(CPU, memory, rate, None, bandwidth, bandwidth, bandwidth, 1024, CPU_EFFICIENCY, "measured here")


def estimates(study: Study, runs: Sequence[StudyRun], gpu: Gpu, gpus: int) -> dict[int, Estimate]:
    """Returns the estimate of each run by its number; runs whose model or data are not known yet are left out."""
    shapes = _shapes(study)
    known: dict[str, Lengths | None] = {}
    found = {}
    for run in runs:
        config = load_config(study.base, [f"output={run.directory}", *run.overrides], elsewhere=True)
        shape = _shape(config, shapes.get(str(run.choices.get("model")), shapes.get("")))
        key = f"{config.data} {config.training.seed} {config.model.path} {config.spo.spec.preference}"
        if key not in known:
            known[key] = _lengths(config, study)
        lengths = known[key]
        if shape is not None and lengths is not None:
            found[run.number] = _estimate(PlannedRun(config, shape, gpu, gpus, lengths))
    return found


def _estimate(job: PlannedRun) -> Estimate:
    plan, steps = plan_layout(job, job.config.parallel), steps_of(job)
    tokens = job.lengths.tokens
    size, pairs = job.config.training.global_batch_size, len(tokens)
    epochs, rest = divmod(steps, -(-pairs // size))
    d = float(tokens.mean()) * (epochs * pairs + min(rest * size, pairs))
    if plan.speed is None:
        return Estimate(job.shape.parameters, d, min(d, float(tokens.sum())), steps, 0.0, 0.0, plan.problems[0])
    seconds = steps * plan.speed.step.total
    if job.gpu.name == CPU:
        seconds += CPU_START + steps * CPU_STEP
    return Estimate(
        n=job.shape.parameters,
        d=d,
        u=min(d, float(tokens.sum())),
        steps=steps,
        flops=plan.speed.flops * steps,
        hours=seconds / 3600,
        problem=plan.problems[0] if plan.problems else "",
    )


def _shapes(study: Study) -> dict[str, ModelShape]:
    """Returns the shapes of the study's own models, which may not have been written yet, by name; "" for `expected`."""
    given = study.spec.expected.model if study.spec.expected else None
    shapes = {"": read_model_shape(given)} if given else {}
    if study.spec.models is None or not (Path(study.spec.models.like) / "config.json").is_file():
        return shapes
    with TemporaryDirectory() as folder:
        for name, config in sized_configs(study.path, study.spec.models).items():
            (Path(folder) / "config.json").write_text(json.dumps(config))
            shapes[name] = read_model_shape(folder)
    return shapes


def _shape(config: Config, own: ModelShape | None) -> ModelShape | None:
    if (Path(config.model.path) / "config.json").is_file():
        return read_model_shape(config.model.path)
    if own is not None:  # such as an SFT model that `before` trains from it
        return own
    try:
        return shape_of(config.model.path)
    except UserError:
        return None


def _lengths(config: Config, study: Study) -> Lengths | None:
    tokenizer = config.model.tokenizer or config.model.path
    if study.spec.models is not None and not Path(tokenizer).is_dir():
        tokenizer = study.spec.models.like
    if is_at_hand(config.data.train, tokenizer):
        kind = "preference" if config.spo.spec.preference else "any"
        return measured_lengths(config.data, config.data.train, tokenizer, kind, seed=config.training.seed)
    given = study.spec.expected
    return None if given is None else _typical(given, config.data.rows or given.pairs)


def _typical(given: ExpectedSpec, pairs: int) -> Lengths:
    prompt, response = np.full(pairs, given.prompt), np.full(pairs, given.response)
    return Lengths(prompt, prompt, response, response, "assumed by the study")


def shown(runs: Sequence[StudyRun], found: Mapping[int, Estimate], gpu: Gpu, gpus: int, most: int) -> str:
    """Returns the table with one line per run, unless there are more than `most`, and the sum; and what it means."""
    names = varied_names(runs)
    unit = ["time"] if gpu.name == CPU else ["time", "GPU hours"]
    rows: list[list[str]] = [["run", *names, "N", "D", "U", "steps", "FLOPs", *unit]]
    for run in runs if len(runs) <= most else ():
        one = found.get(run.number)
        rows.append([str(run.number), *(str(run.choices[name]) for name in names), *_cells(one, gpu, gpus)])
    known = list(found.values())
    total = Estimate(
        0, sum(e.d for e in known), 0, sum(e.steps for e in known), sum(e.flops for e in known),
        sum(e.hours for e in known),
    )  # fmt: skip
    if known:
        cells = _cells(total, gpu, gpus)
        rows.append([f"sum of {len(known)}", *("" for _ in names), "", cells[1], "", *cells[3:]])
    table = tabulate(rows, tablefmt="plain", colalign=["right"] * len(rows[0]), disable_numparse=True)
    on = f" on this CPU ({os.cpu_count()} cores)" if gpu.name == CPU else f" on {gpus} x {gpu.name}"
    lines = [table, LEGEND.format(device=on)]
    if missing := len(runs) - len(known):
        lines.append(f"{missing} runs are not known yet, since their model or data do not exist; give `expected` in "
                     "the study, or run its commands of `before` first")  # fmt: skip
    lines += [f"run {number}: {one.problem}" for number, one in found.items() if one.problem]
    return "\n".join(lines)


def _cells(one: Estimate | None, gpu: Gpu, gpus: int) -> list[str]:
    hours = 1 if gpu.name == CPU else 2
    if one is None:
        return ["-"] * (5 + hours)
    times = [_time(one.hours), f"{one.hours * gpus:.2g}"][:hours]
    return [amount(one.n), amount(one.d), amount(one.u), str(one.steps), f"{one.flops:.2g}", *times]


def _time(hours: float) -> str:
    """Returns a time as seconds, minutes or hours."""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.2g} h"
