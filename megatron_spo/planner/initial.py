"""Writes a first configuration for a model and a file of pairs, with a layout and lengths chosen by the planner."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spo.config.load import load_values
from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.schema import Config, ParallelConfig, keys_of, section_class
from megatron_spo.config.yaml_text import inline
from megatron_spo.data import hub
from megatron_spo.errors import UserError
from megatron_spo.planner.disk import checkpoint_bytes, gigabytes
from megatron_spo.planner.gpus import GIB, Gpu, cpu_remark, find_gpu
from megatron_spo.planner.layouts import Plan, PlannedRun, ranked
from megatron_spo.planner.presets import shape_of
from megatron_spo.planner.rows import Lengths, measured_lengths
from megatron_spo.planner.tables import describe, duration, is_tight, run_hours, steps_of

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCHES, STEPS = (128, 64, 32, 16, 8, 4), 50
"""Batch sizes to choose from: the largest one with at least this number of steps per epoch, else the smallest."""
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
ROWS = (2048, 4096, 8192)
"""Lengths of a packed row to try, if they hold the longest pair."""
BETTER = 0.97
"""A longer row must reduce the time per step to this fraction to be preferred, because it needs more memory."""


@dataclass(frozen=True)
class Request:
    """Options of `megatron-spo init`; `gpus` is None to find the smallest number that suffices."""

    model: str
    pairs: str
    overrides: Sequence[str]
    gpus: int | None
    gpu: str


@dataclass(frozen=True)
class Choice:
    """The values that were chosen, and the plan that they lead to."""

    config: Config
    job: PlannedRun
    plan: Plan


def initial_configuration(request: Request) -> str:
    """Returns the text of a configuration for `megatron-spo train`, with comments.

    Raises:
        UserError: model, pairs or overrides are invalid, or no layout fits.
    """
    folder = request.model
    if not Path(folder).is_dir():
        folder = str(hub.download(folder, "MODEL", hub.SMALL_FILES))
    output = f"runs/{Path(request.pairs).stem or 'run'}"
    values: dict[str, Any] = {"output": output, "model": {"path": request.model}, "data": {"train": request.pairs},
                              "reference": {"cache": "reference"}}  # fmt: skip
    config = load_values(values, "init", request.overrides, elsewhere=True)
    if not any(override.startswith("reference.cache=") for override in request.overrides):
        values["reference"]["cache"] = f"{values['output']}-reference"
    given = {f"{name}.{key}" for name, section in values.items() if isinstance(section, dict) for key in section}
    shape = shape_of(folder)
    lengths = _lengths(config, shape, given, folder)
    values = _with_lengths(values, lengths, shape, given)
    choice = _choice(request, values, given, shape, lengths)
    return "\n".join(_text(request, choice, values)) + "\n"


def _lengths(config: Config, shape: ModelShape, given: set[str], folder: str) -> Lengths:
    data = config.data
    if "data.max_length" not in given:  # find the longest pair; one beyond the context is an error, as in training
        data = data.model_copy(update={"max_length": shape.max_positions, "row_length": None})
    kind = "preference" if config.spo.spec.preference else "any"
    return measured_lengths(data, data.train, config.model.tokenizer or folder, kind)


def _with_lengths(values: dict[str, Any], lengths: Lengths, shape: ModelShape, given: set[str]) -> dict[str, Any]:
    """Returns the values with the keys that depend on the number and the lengths of the pairs."""
    longest = int((lengths.shared + lengths.chosen_tail).max()), int((lengths.shared + lengths.rejected_tail).max())
    fitting = next((length for length in LENGTHS if length >= max(longest)), shape.max_positions)
    size = next((one for one in BATCHES if len(lengths) >= one * STEPS), BATCHES[-1])
    training = values.get("training", {})
    size = training.get("global_batch_size", size)
    steps = training.get("steps") or math.ceil(len(lengths) / size * (training.get("epochs") or 1))
    rank = values.get("lora", {}).get("rank", 0)
    chosen: dict[str, dict[str, Any]] = {
        "data": {"max_length": min(fitting, shape.max_positions)},
        "loss": {"name": "dpo"},
        "spo": {"schedule": "penalty", "lambda": 1.0},
        "optimizer": {"lr": 1e-4 if rank else 1e-6, "warmup_steps": min(steps // 10, 100), "decay": "cosine"},
        "training": {"global_batch_size": size, **({} if "training.steps" in given else {"epochs": 1})},
        "checkpoint": {"every": max(steps // 4, 10) if steps > 20 else 0},
    }
    if values.get("spo", {}).get("schedule", "penalty") not in ("penalty", "dual"):
        del chosen["spo"]
    if "eval" in values["data"]:
        chosen["training"]["eval_every"] = max(steps // 4, 1)
    merged = {name: {**chosen.get(name, {}), **values.get(name, {})} for name in {*chosen, *values} - {"output"}}
    return {"output": values["output"], **merged}


def _choice(request: Request, values: dict[str, Any], given: set[str], shape: ModelShape, lengths: Lengths) -> Choice:
    """Writes the row length and the layout into `values`, and returns the plan."""
    gpu, longest = find_gpu(request.gpu, {}), int(lengths.tokens.max())
    default = 2 * values["data"]["max_length"]
    rows = sorted({row for row in (default, *ROWS) if row >= longest})
    if "data.row_length" in given:
        rows = [values["data"]["row_length"]]
    for gpus in [request.gpus] if request.gpus else COUNTS:
        found: list[Choice] = []
        for row in rows:
            config = load_values({**values, "data": {**values["data"], "row_length": row}}, "init", elsewhere=True)
            found += _best(PlannedRun(config, shape, gpu, gpus, lengths), given, tight=request.gpus is not None)
        best = _preferred(found)
        if best is not None:
            values["data"]["row_length"] = best.config.data.row_length
            layout = _keys_of(best.plan.parallel)
            if layout and "parallel" not in values:
                values["parallel"] = layout
            return best
    raise UserError(_too_large(request, gpu, shape))


def _best(job: PlannedRun, given: set[str], *, tight: bool) -> list[Choice]:
    """Returns the fastest plan that fits, preferably (with `tight` not necessarily) one that leaves some memory; [] if
    there is none."""
    fitting, _ = ranked(job)
    if any(key.startswith("parallel.") for key in given):
        fitting = [plan for plan in fitting if plan.parallel == job.config.parallel]
    safe = [plan for plan in fitting if not is_tight(job, plan)]
    return [Choice(job.config, job, plan) for plan in (safe or (fitting if tight else []))[:1]]


def _preferred(found: Sequence[Choice]) -> Choice | None:
    """Returns the choice with the shortest rows, unless longer ones are clearly faster."""
    best: Choice | None = None
    for one in found:
        assert one.plan.speed
        if best is None or (best.plan.speed and one.plan.speed.step.total < BETTER * best.plan.speed.step.total):
            best = one
    return best


def _keys_of(parallel: ParallelConfig) -> dict[str, Any]:
    return {key: value for key, value in parallel.model_dump().items() if value != getattr(ParallelConfig(), key)}


def _too_large(request: Request, gpu: Gpu, shape: ModelShape) -> str:
    where = f"{request.gpus} x {gpu.name}" if request.gpus else f"up to {COUNTS[-1]} x {gpu.name}"
    return (f"no layout of this {shape.family} model fits on {where}; give another number of --gpus or leave it out to "
            "find the smallest, or give lora.rank=16 or a shorter data.row_length")  # fmt: skip


def _text(request: Request, choice: Choice, values: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of the configuration."""
    yield from _heading(request, choice, values)
    comments = _comments(choice)
    for name in [name for name in Config.model_fields if values.get(name)]:
        section = section_class(name)
        if section is None:
            yield f"{name}: {inline(values[name])}{comments.get(name, '')}"
            continue
        yield f"{name}:"
        for key in [key for key in keys_of(section) if key in values[name]]:
            value = values[name][key]
            yield f"  {key}: {inline(value)}{'' if value is None else comments.get(f'{name}.{key}', '')}"
            if key == "train" and "eval" not in values[name]:
                yield "  # eval: held-out.jsonl  # pairs to evaluate on; then also set training.eval_every"


def _heading(request: Request, choice: Choice, values: dict[str, Any]) -> Iterator[str]:
    """Yields the comments at the start: the plan, and the commands to run."""
    job, plan = choice.job, choice.plan
    assert plan.memory and plan.speed
    gpus = [] if request.gpus is None else ["--gpus", str(request.gpus)]
    yield f"# {shlex.join(['megatron-spo', 'init', request.model, request.pairs, *request.overrides, *gpus])}"
    where = f"{job.gpus} {job.gpu.name.upper()} ({describe(plan.parallel)})" if job.gpus > 1 else job.gpu.name.upper()
    yield f"# Planned for {where}, computed and not measured:"
    memory = f"{plan.memory.total / GIB:.0f} of {job.gpu.memory / GIB:.0f} GiB of memory"
    time = f"{plan.speed.step.total:.2g} s per step, {steps_of(job)} steps, {duration(run_hours(job, plan))}"
    yield f"# {memory}, {time}."
    if remark := cpu_remark(job.gpus):
        yield f"# This machine has {remark}."
    cached = bool(values["reference"].get("cache"))
    if job.gpus > job.gpu.per_node:
        nodes = -(-job.gpus // job.gpu.per_node)
        yield f"# Run: megatron-spo slurm submit my.yaml --nodes {nodes}"
    else:
        start = "megatron-spo" if job.gpus == 1 else f"torchrun --nproc-per-node {job.gpus} -m megatron_spo"
        yield f"# Run: {start} reference my.yaml  (once)" if cached else f"# Run: {start} train my.yaml"
        if cached:
            yield f"#      {start} train my.yaml  (again to resume)"
        yield f"#      megatron-spo convert {shlex.quote(values['output'])} my-model --to hf"
    yield "# All keys of a section: megatron-spo train --help SECTION"


def _comments(choice: Choice) -> dict[str, str]:
    """Returns the comments of the keys."""
    lengths, config = choice.job.lengths, choice.config
    count = f"{len(lengths)} pairs"
    longest = int((lengths.shared + lengths.chosen_tail).max()), int((lengths.shared + lengths.rejected_tail).max())
    size = gigabytes(checkpoint_bytes(config, choice.job.shape))
    comments = {
        "output": "the run directory: checkpoints, metrics, report",
        "model.path": "Hugging Face folder or hub id",
        "data.train": count,
        "data.max_length": f"tokens of prompt + response; the longest has {max(longest)}. Longer ones are an error",
        "data.row_length": f"tokens of a packed row; the longest pair has {int(lengths.tokens.max())}",
        "reference.cache": "shared by all runs with this model and these pairs",
        "loss.name": "or simpo, ipo, ...: megatron-spo train --help loss",
        "spo.schedule": "how the SFT term is added; none: the preference loss alone",
        "spo.lambda": "weight of the SFT term; raise it if spo/gap rises",
        "optimizer.lr": f"peak; {'all weights: about 1e-6' if config.lora.rank else 'with LoRA about 1e-4'}",
        "training.global_batch_size": "pairs per step over all GPUs",
        "checkpoint.every": f"steps, 0: only at the end; a checkpoint takes {size}",
        "training.eval_every": "steps between evaluations of data.eval",
    }
    return {key: f"  # {text}" for key, text in comments.items()}
