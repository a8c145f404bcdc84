"""Assembles a training run from all parts of the package and runs it."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import megatron_spo.runtime.megatron_import  # noqa: F401  (before the modules that import Megatron)
from megatron_spo.checkpoint.compatibility import changes, check_base
from megatron_spo.checkpoint.folder import Checkpoint
from megatron_spo.checkpoint.load import find, load
from megatron_spo.checkpoint.save import Saver
from megatron_spo.config.load import dump_config, plain
from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.config.schema import Config, TrainingConfig
from megatron_spo.data.chat_template import template_date
from megatron_spo.data.end_of_turn import end_tokens
from megatron_spo.data.loader import Loader
from megatron_spo.errors import UserError
from megatron_spo.model.lora import add_adapters
from megatron_spo.model.optimizer import Trainable, make_trainable
from megatron_spo.objective.schedules import initial_state
from megatron_spo.objective.statistics import LossStatistics
from megatron_spo.planner.rows import lengths_of
from megatron_spo.planner.utilisation import Utilisation, peak_of
from megatron_spo.prepare import SFT, TRAIN, Inputs, join, make_loader, make_model, read_inputs, shows_progress
from megatron_spo.reference.cache import ReferenceStore, is_absent, open_reference
from megatron_spo.reference.fill import fill_missing
from megatron_spo.reference.fingerprint import numerics, reference_fingerprint, weights_fingerprint
from megatron_spo.reference.sources import AdaptersOff, CachedSums, ReferenceSums
from megatron_spo.runtime.device import name_of
from megatron_spo.runtime.env import wandb_project
from megatron_spo.runtime.processes import Runtime, agreed, on_main
from megatron_spo.runtime.signals import signals
from megatron_spo.runtime.watchdog import watch
from megatron_spo.train import loop
from megatron_spo.train.before import REPORT, check_paths, finished, what_is_next
from megatron_spo.train.memory import PeakMemory, announce_memory
from megatron_spo.train.run_directory import RunDirectory
from megatron_spo.train.sample_answers import HeldOutAnswers
from megatron_spo.train.sinks import TensorBoard, WeightsAndBiases
from megatron_spo.train.state import TrainState
from megatron_spo.train.step import DataInUse, Engine
from megatron_spo.train.step_lines import StepLines
from megatron_spo.train.stop import StopRequest

LOG = logging.getLogger(__name__)

PACKAGES = ("megatron-spo", "megatron-core", "torch", "transformers", "transformer-engine", "apex")
"""Packages whose versions a run records."""


def train(config: Config) -> None:
    """Trains as configured; resumes from the newest checkpoint if the run directory has one.

    Raises:
        UserError, Anomaly, Stopped: on every rank alike; status.json then has the state "failed" or "stopped" and the
            reason.
    """
    runtime = join(config)
    with agreed():
        check_paths(config)
    if message := on_main(lambda: finished(config), UserError):
        if runtime.is_main:
            print(message)
        return
    found = find(Path(config.output) / "checkpoints", scales=config.precision.fp8 is not None)
    if found:
        changes(found, plain(config), {})
    directory = RunDirectory(Path(config.output), is_main=runtime.is_main)
    on_main(directory.make, UserError)
    directory.status("running", found.step if found else 0, **({"checkpoint": found.path.name} if found else {}))
    directory.phase("reading the data")
    runtime.progress.on_phase = directory.phase
    signals.before_exit = directory.ended
    watch().on_loss = lambda verdict: directory.ended(verdict.code, verdict.message, anyway=True)
    code = 0
    try:
        _train(config, runtime, directory, found)
    except BaseException as error:
        code = getattr(error, "code", 1)
        directory.ended(code, str(error) or type(error).__name__)
        raise
    finally:
        directory.sinks.close(directory.path / REPORT, code)


def _train(config: Config, runtime: Runtime, directory: RunDirectory, found: Checkpoint | None) -> None:
    inputs = read_inputs(config, runtime)
    planned = announce_memory(config, inputs, runtime)
    record = _record(config, inputs)
    changed = changes(found, record["config"], record["data"]) if found else []
    runtime.progress.phase("building and loading", times=4)
    weights = weights_fingerprint(config, inputs) if config.lora.rank or config.reference.cache else None
    if config.lora.rank:
        record["weights"] = weights
        if found:
            check_base(found, weights)
    stores = _open_references(config, inputs, weights, runtime)
    on_main(lambda: _write_provenance(config, directory, inputs, weights), UserError)
    chunks = make_model(config, inputs)
    add_adapters(chunks, inputs.shape, config.lora, config.training.seed)
    overlap = runtime.topology.data * runtime.topology.context > 1
    trainable = make_trainable(chunks, chunks[0].config, config.optimizer, overlap=overlap)
    loaders = {name: make_loader(config, name, dataset, runtime) for name, dataset in inputs.named_sets().items()}
    references: dict[str, ReferenceSums] = {name: CachedSums(one, runtime.device) for name, one in stores.items()}
    if config.runs_reference:
        references = {name: AdaptersOff(trainable, runtime) for name in loaders}
    data = {name: DataInUse(name, loader, references.get(name)) for name, loader in loaders.items()}
    steps = _steps(config.training, loaders[TRAIN])
    job = loop.Training(
        config=config,
        engine=Engine(
            trainable, runtime, loss=config.loss, spo=config.spo, router_aux_loss=config.model.router_aux_loss or 0.0
        ),
        saver=Saver(directory.checkpoints, trainable, record, keep=config.checkpoint.keep),
        train=data.pop(TRAIN),
        sft=data.pop(SFT, None),
        evals=list(data.values()),
        directory=directory,
        decode=lambda ids: str(inputs.tokenizer.decode(list(ids))),
        answer=HeldOutAnswers(config, inputs, trainable, record, directory=directory, runtime=runtime)
        if config.monitor.generate_every
        else None,
        steps=steps,
        stop=StopRequest(config.training.time_limit, runtime.device),
        progress=runtime.progress,
        clock=runtime.clock,
        lines=_step_lines(config, found.step if found else 0, steps, runtime),
        memory=PeakMemory(runtime.device),
        at_peak=_at_peak(config, inputs, runtime),
    )
    state = _start(config, trainable, found, changed, runtime)
    _open_sinks(config, directory, state.step, [*inputs.evals])
    pending = [held_out.name for held_out in job.evals] if state.evaluation_pending else []
    directory.open_metrics(after_step=state.step, pending=pending)
    directory.status("running", state.step, steps=job.steps)
    signals.after_step()
    state = loop.run(job, state)
    job.memory.compare(planned)
    runtime.progress.phase("report", times=4)
    directory.status("done", state.step, steps=job.steps)
    if runtime.is_main:
        if config.logging.report:
            _report(directory)
        print(f"{config.output}: all {state.step} steps are done\n{what_is_next(config)}")


def _report(directory: RunDirectory) -> None:
    """Writes the run's HTML report; if that fails, only the report is missing."""
    with directory.tolerated(REPORT):
        from megatron_spo.report import write_report  # imports matplotlib

        write_report([directory.path], directory.path / REPORT)


def _open_references(
    config: Config, inputs: Inputs, weights: str | None, runtime: Runtime
) -> dict[str, ReferenceStore]:
    """Opens the reference cache of every data set, and makes what is absent; returns {} if the config has none."""
    cache = config.reference.cache
    if cache is None or weights is None:
        return {}
    if inputs.reference is not None:
        config = config.of_reference
        inputs = replace(inputs, folder=inputs.reference, shape=read_model_shape(inputs.reference))
        weights = weights_fingerprint(config, inputs)
    sets = inputs.named_sets()
    prints = {name: reference_fingerprint(config, inputs, dataset, weights) for name, dataset in sets.items()}
    absent = on_main(lambda: [name for name in sets if is_absent(cache, name, prints[name])], UserError)
    if absent and config.reference.make:
        if runtime.is_main:
            LOG.info(f"{cache} has no log-probs of the reference for {', '.join(absent)}; computing them first "
                     "(megatron-spo reference does the same)")  # fmt: skip
        fill_missing(config, inputs, weights, runtime, absent)
        runtime.progress.phase("building and loading", times=4)
    stores: dict[str, ReferenceStore] = {}
    with agreed():
        for name, dataset in sets.items():
            stores[name] = open_reference(cache, name, prints[name], dataset)
    return stores


def _steps(training: TrainingConfig, loader: Loader) -> int:
    if training.steps is not None:
        return training.steps
    return max(1, math.ceil((training.epochs or 1.0) * loader.steps_per_epoch - 1e-9))


def _step_lines(config: Config, done: int, steps: int, runtime: Runtime) -> StepLines:
    return StepLines(
        done=done,
        steps=steps,
        processes=runtime.topology.world,
        on_gpu=runtime.device.type == "cuda",
        every=config.logging.every,
        shown=shows_progress(config),
    )


def _at_peak(config: Config, inputs: Inputs, runtime: Runtime) -> loop.AtPeak | None:
    """Returns the function that gives the time of pairs at the GPUs' peak, or None if the peak is unknown."""
    peak = peak_of(name_of(runtime.device), fp8=config.precision.fp8 is not None)
    if peak is None:
        return None
    sets = {name: lengths_of(dataset, name) for name, dataset in inputs.named_sets().items()}
    return Utilisation(config, inputs.shape, sets, peak * runtime.topology.world).seconds


def _record(config: Config, inputs: Inputs) -> dict[str, Any]:
    """Returns the record for the checkpoints: what affects how training resumes, and what an export needs to know about
    the data."""
    data = {TRAIN: inputs.train, **({} if inputs.sft is None else {SFT: inputs.sft})}
    return {
        "config": plain(config),
        "data": {name: dataset.fingerprint for name, dataset in data.items()},
        "chat_template": inputs.tokenizer.chat_template if config.data.chat_template else None,
        "ends": end_tokens(data.values(), config.data, inputs.tokenizer),
    }


def _start(
    config: Config, trainable: Trainable, found: Checkpoint | None, changed: Sequence[str], runtime: Runtime
) -> TrainState:
    """Returns the state to start from: the checkpoint's, or a new one."""
    if found is None:
        return TrainState(0, initial_state(config.spo), LossStatistics())
    if runtime.is_main:
        what = f"; changed: {'; '.join(changed)}" if changed else ""
        LOG.info(f"{config.output}: resuming from {found.path.name}{what}")
    load(found, trainable)
    return TrainState.from_dict(found.state)


def _write_provenance(config: Config, directory: RunDirectory, inputs: Inputs, weights: str | None) -> None:
    """Writes the resolved config, the versions and fingerprints, and the dropped rows."""
    directory.write_kept("config.yaml", dump_config(config))
    provenance = {
        "versions": {name: _version(name) for name in PACKAGES},
        "numerics": numerics(config.precision, experts=inputs.shape.experts is not None),
        "data": {name: dataset.fingerprint for name, dataset in inputs.named_sets().items()},
        "model": str(inputs.folder),
        "weights": weights,
        "template_date": template_date(inputs.tokenizer),
    }
    directory.write_kept("provenance.json", json.dumps(provenance, indent=1))
    dropped = [(name, row) for name, dataset in inputs.named_sets().items() for row in dataset.dropped]
    directory.write_rows("dropped_rows.jsonl", [{"set": name, **vars(row)} for name, row in dropped])
    if dropped and directory.is_main:
        LOG.info(f"{len(dropped)} rows dropped; listed in {directory.path / 'dropped_rows.jsonl'}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _open_sinks(config: Config, directory: RunDirectory, step: int, sets: Sequence[str]) -> None:
    """Opens Weights & Biases and TensorBoard if they are configured."""
    if not directory.is_main:
        return
    settings, folder = config.logging, directory.path
    if settings.wandb != "off":
        directory.sinks.open(
            WeightsAndBiases, folder, mode=settings.wandb, project=wandb_project(), config=plain(config), sets=sets
        )
    if settings.tensorboard:
        directory.sinks.open(TensorBoard, folder, after_step=step, sets=sets)
