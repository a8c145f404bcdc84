"""Checks a run without starting it: configuration, model, data, disk and memory, for `megatron-spo train --check`."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_spo.config.data_source import DataSource
from megatron_spo.config.load import load_config
from megatron_spo.config.model_folder import has_weights
from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.rules import Facts, broken_rules
from megatron_spo.config.schema import Config
from megatron_spo.data import hub
from megatron_spo.data.dataset import TokenizedSet, build_dataset
from megatron_spo.data.tokenize import load_tokenizer
from megatron_spo.errors import UserError
from megatron_spo.planner.disk import checkpoint_bytes, disk_line, gigabytes, most_checkpoints
from megatron_spo.planner.gpus import GIB, Gpu, cpu_remark
from megatron_spo.planner.layouts import PlannedRun, plan_layout, ranked
from megatron_spo.planner.presets import shape_of
from megatron_spo.planner.rows import lengths_of
from megatron_spo.planner.tables import as_overrides, describe, duration, is_tight, run_hours, steps_of

CACHE_BYTES = 24
"""Bytes of the reference cache per pair."""
BETTER = 0.9
"""A layout is named as faster if it needs less than this fraction of the time."""

State = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    state: State
    text: str

    def __str__(self) -> str:
        return f"{self.state:<6} {self.name:<14} {self.text}"


@dataclass(frozen=True)
class Prepared:
    """A checked configuration with its model and data."""

    config: Config
    shape: ModelShape
    sets: dict[str, TokenizedSet]


def check_run(path: str, overrides: Sequence[str], gpus: int | None, gpu: Gpu) -> Iterator[Finding]:
    """Yields the results of the checks, those that take seconds last.

    Args:
        path: the configuration file.
        overrides: overrides of its keys.
        gpus: number of GPUs; None: one data-parallel replica.
        gpu: type of the GPUs.

    Raises:
        UserError: what follows cannot be checked, because the configuration, the model or the data are wrong.
    """
    config = load_config(path, overrides, elsewhere=True)
    parallel = config.parallel
    count = gpus or parallel.tensor * parallel.pipeline * parallel.context
    config = load_config(path, overrides, world_size=count, elsewhere=True)
    replicas = count // (parallel.tensor * parallel.pipeline * parallel.context)
    yield Finding("configuration", "ok", f"{path}: {', '.join(config.loss.names)}, spo.schedule: {config.spo.schedule}")
    yield Finding("layout", "ok", f"{count} GPU{'s' * (count > 1)}: {describe(parallel)}, data parallel {replicas}")
    yield from _this_machine(config)
    folder, model = _model(config)
    shape = shape_of(str(folder))
    if broken := broken_rules(Facts(config, frozenset(), shape, count, elsewhere=True)):
        raise UserError("\n".join(broken))
    yield model
    prepared = Prepared(config, shape, _sets(config, folder))
    yield from _data(prepared)
    job = PlannedRun(config, shape, gpu, count, lengths_of(prepared.sets["train"], "measured"))
    yield _reference(prepared)
    yield _disk(prepared, steps_of(job))
    yield from _memory(job)


def _this_machine(config: Config) -> Iterator[Finding]:
    """Yields what is missing on this machine, which the run may not use."""
    for message in broken_rules(Facts(config, frozenset(), None, None)):
        yield Finding("this machine", "note", message)


def _model(config: Config) -> tuple[Path, Finding]:
    path = Path(config.model.path)
    if path.is_dir():
        state: State = "ok" if has_weights(path) or config.model.init == "random" else "wrong"
        return path, Finding("model", state, f"{path}" if state == "ok" else f"{path} has no safetensors weights")
    folder = hub.download(config.model.path, "model.path", hub.SMALL_FILES)
    if has_weights(folder):
        return folder, Finding("model", "ok", f"{config.model.path}, cached in {folder}")
    text = "is not downloaded yet; if the nodes have no network, run hf download"
    return folder, Finding("model", "note", f"{config.model.path} {text} {config.model.path}")


def _sets(config: Config, folder: Path) -> dict[str, TokenizedSet]:
    tokenizer = load_tokenizer(config.model.tokenizer or str(folder), config.data.chat_template)
    kind = "preference" if config.spo.spec.preference else "any"

    def build(sources: Sequence[DataSource], kind: str = kind) -> TokenizedSet:
        return build_dataset(sources, config.data, tokenizer, kind=kind)

    sets = {"train": build(config.data.train)}
    if config.spo.sft_data:
        sets["sft"] = build(config.spo.sft_data, "sft")
    return sets | {source.path: build([source]) for source in config.data.eval}


def _data(prepared: Prepared) -> Iterator[Finding]:
    for name, dataset in prepared.sets.items():
        dropped = f", {len(dataset.dropped)} rows dropped" if dataset.dropped else ""
        longest = int(dataset.tokens.max())
        text = f"{name}: {len(dataset)} rows{dropped}; the longest has {longest} tokens (packed)"
        yield Finding("data", "note" if dropped else "ok", text)


def _reference(prepared: Prepared) -> Finding:
    cache = prepared.config.reference.cache
    if cache is None:
        return Finding("reference", "ok", "no cache is configured")
    made = Path(cache).is_dir() and any(Path(cache).iterdir())
    return Finding("reference", "ok", f"{cache} {'exists' if made else 'is made by the reference pass'}")


def _disk(prepared: Prepared, steps: int) -> Finding:
    config, shape = prepared.config, prepared.shape
    place = Path(config.output).absolute()
    while not place.exists():
        place = place.parent
    needed = checkpoint_bytes(config, shape) * most_checkpoints(config, steps)
    needed += CACHE_BYTES * sum(len(dataset) for dataset in prepared.sets.values())
    free = shutil.disk_usage(place).free
    try:
        tempfile.TemporaryDirectory(dir=place).cleanup()
    except OSError as error:
        return Finding("disk", "wrong", f"{place} cannot be written to ({error.strerror}); choose another output")
    text = f"{disk_line(config, shape, steps)}; {gigabytes(free)} are free in {place}"
    if free < needed:
        return Finding("disk", "wrong", f"{text}; free some space, or set a smaller checkpoint.keep or another output")
    return Finding("disk", "ok", text)


def _memory(job: PlannedRun) -> Iterator[Finding]:
    plan = plan_layout(job, job.config.parallel)
    if plan.memory is None or plan.speed is None:
        yield Finding("memory", "wrong", "; ".join(plan.problems))
        return
    text = f"{plan.memory.total / GIB:.0f} of {job.gpu.memory / GIB:.0f} GiB per {job.gpu.name.upper()}, computed"
    state: State = "ok" if plan.fits else "wrong"
    if is_tight(job, plan):
        state, text = "note", f"{text}; it may not fit, because 3 GiB of it are assumed"
    fitting, _ = ranked(job)
    advice = f"; these fit: {as_overrides(fitting[0].parallel)}" if fitting else "; no layout fits on these GPUs"
    yield Finding("memory", state, text if plan.fits else text + advice)
    if not plan.fits:
        return
    seconds = plan.speed.step.total
    text = f"{seconds:.2g} s per step, {steps_of(job)} steps, {duration(run_hours(job, plan))}, computed"
    yield Finding("time", "ok", text)
    if remark := cpu_remark(job.gpus):
        yield Finding("this machine", "note", remark)
    fastest = next((one for one in fitting if not is_tight(job, one)), None)
    if fastest and fastest.speed and fastest.speed.step.total < BETTER * seconds:
        less = 1 - fastest.speed.step.total / seconds
        keys = as_overrides(fastest.parallel) or "parallel.tensor=1 parallel.pipeline=1"
        yield Finding("layout", "note", f"{describe(fastest.parallel)} takes {less:.0%} less time: {keys}")
