"""Probes that run inside a process with a GPU and measure what the commands do not show. Each returns JSON."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_spo.checkpoint.folder import Checkpoint
from megatron_spo.checkpoint.load import find, load
from megatron_spo.checkpoint.save import Saver
from megatron_spo.config.schema import Config
from megatron_spo.model.optimizer import Trainable, make_trainable
from megatron_spo.objective.schedules import initial_state
from megatron_spo.objective.statistics import LossStatistics
from megatron_spo.prepare import join, make_model, read_inputs
from megatron_spo.train import run, step
from megatron_spo.train.state import TrainState
from tests.support.megatron import engine_keys, sharded_keys


def _trainable(config: Config) -> Trainable:
    chunks = make_model(config, read_inputs(config, join(config)))
    return make_trainable(chunks, chunks[0].config, config.optimizer, overlap=False)


def layers(config: Config) -> dict[str, Any]:
    """Returns the classes of the layers, their keys, and the unexpected keys."""
    inputs = read_inputs(config, join(config))
    (model,) = make_model(config, inputs)
    layer = model.decoder.layers[0]
    parts = {"qkv": layer.self_attention.linear_qkv, "fc2": layer.mlp.linear_fc2,
             "core": layer.self_attention.core_attention, "q_norm": layer.self_attention.q_layernorm,
             "final": model.decoder.final_layernorm}  # fmt: skip
    unmarked = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and not getattr(parameter, "tensor_model_parallel", False)
    ]
    return {
        "classes": {name: type(part).__name__ for name, part in parts.items()},
        "other_keys": sorted(sharded_keys(model) ^ engine_keys(inputs.shape)),
        "unmarked": unmarked,
        "device": str(next(model.parameters()).device),
    }


def fresh(config: Config) -> dict[str, Any]:
    """Returns the optimizer's class, and the step after saving and loading an optimizer that has never stepped."""
    trainable = _trainable(config)
    folder = Path(config.output) / "checkpoints"
    _save(Saver(folder, trainable, {}, keep=1), TrainState(0, initial_state(config.spo), LossStatistics()))
    adam = type(trainable.optimizer.chained_optimizers[0].optimizer)
    step = _load(_newest(folder, config), trainable).step
    return {"adam": f"{adam.__module__}.{adam.__name__}", "step": step}


def resave(config: Config) -> None:
    """Loads the newest checkpoint of the run into a new model and optimizer, and saves it again next to it."""
    folder = Path(config.output) / "checkpoints"
    newest, trainable = _newest(folder, config), _trainable(config)
    state = _load(newest, trainable)
    _save(Saver(folder.with_name("checkpoints-again"), trainable, newest.record, keep=1), state)


def _load(found: Checkpoint, trainable: Trainable) -> TrainState:
    load(found, trainable)
    return TrainState.from_dict(found.state)


def _save(saver: Saver, state: TrainState) -> None:
    saver.start(state, in_background=False)
    assert saver.finished(wait=True)


def _newest(folder: Path, config: Config) -> Checkpoint:
    found = find(folder, scales=config.precision.fp8 is not None)
    assert found is not None
    return found


def waits(config: Config) -> list[dict[str, Any]]:
    """Trains and returns for each pass over rows how often, and where, the process waited for the GPU."""
    seen: list[dict[str, Any]] = []
    original: Callable[..., Any] = step.run_rows

    def watched(chunks: Any, rows: Sequence[Any], *arguments: Any, **keywords: Any) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = original(chunks, rows, *arguments, **keywords)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message))
        seen.append({"rows": len(rows), "waits": sum(places.values()), "places": dict(places.most_common(5))})
        return result

    step.run_rows = watched
    try:
        run.train(config)
    finally:
        step.run_rows = original
    return seen
