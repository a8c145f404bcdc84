"""Checkpoints in Megatron's torch_dist format, loadable in any layout.

    checkpoints/step_00000200/   Megatron's shards (of adapters alone, where a model has them) and metadata, and
                                 trainer.json (TrainState)
    checkpoints/latest           the name of the newest complete one

A checkpoint is written under a name of its own and renamed when it is complete on every rank; `latest` moves last.
"""

import json
import os
import queue
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megatron_spo.errors import UserError
from megatron_spo.model.build import PairModel
from megatron_spo.model.lora import load_beside_base, without_base
from megatron_spo.model.wrap import Trainable
from megatron_spo.train.state import TrainState

LATEST = "latest"
STATE_FILE = "trainer.json"
_SHARDING = "fully_reshardable"


def step_name(step: int) -> str:
    """Name of the checkpoint folder after `step` steps."""
    return f"step_{step:08d}"


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a `checkpoints` folder, or None.

    Raises:
        UserError: `latest` names one that is not there.
    """
    marker = folder / LATEST
    if not marker.exists():
        return None
    path = folder / marker.read_text().strip()
    if not (path / STATE_FILE).exists():
        raise UserError(f"{marker} names {path.name}, which is not a complete checkpoint; write the name of another "
                        f"folder of {folder} into it, or remove it to start anew")  # fmt: skip
    return path


def save(folder: Path, trainable: Trainable, state: TrainState, *, keep: int) -> Path:
    """Write a checkpoint from all ranks together and move `latest` to it; returns its path.

    Older checkpoints beyond `keep` are removed. An interrupted save leaves the earlier ones as they were.
    """
    final, partial = folder / step_name(state.step), folder / f".{step_name(state.step)}.partial"
    is_main = dist.get_rank() == 0
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    _collect_results_here()
    trainable.gather_weights()
    dist_checkpointing.save(_contents(trainable, loading=False), str(partial))
    dist.barrier()
    if is_main:
        (partial / STATE_FILE).write_text(json.dumps(state.to_dict(), indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        marker = folder / f".{LATEST}.new"
        marker.write_text(final.name)
        os.replace(marker, folder / LATEST)
        for old in sorted(folder.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def _collect_results_here() -> None:
    """Give Megatron's writer a queue within this process, which is where a synchronous save hands over its results.

    megatron-core 0.16.1 would start a manager process for it (filesystem_async.py), 2 s of every run.
    """
    if not hasattr(filesystem_async, "_results_queue"):
        raise RuntimeError("filesystem_async._results_queue is gone from Megatron-Core: drop this function")
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def load(path: Path, trainable: Trainable) -> TrainState:
    """Fill model and optimizer from a checkpoint written in any layout.

    Raises:
        UserError: it is damaged, or of another model.
    """
    try:
        found = dist_checkpointing.load(_contents(trainable, loading=True), str(path))
    except (Exception, CheckpointException) as error:  # many kinds, for files that are torn or of another model
        first_line = str(error).splitlines()[0][:200]
        raise UserError(
            f"{path} cannot be loaded ({type(error).__name__}: {first_line}); it is damaged or of another model: "
            f"name an earlier one in {path.parent / LATEST}"
        ) from error
    for name, chunk in _named_chunks(trainable):
        load_beside_base(chunk, found[name])
    with torch.no_grad():
        for i, inner in enumerate(trainable.optimizer.chained_optimizers):
            state = inner.state_dict()
            for group in state["optimizer"]["param_groups"]:
                group["step"] = found["optimizer_step"]
            inner.load_state_dict({**state, **found["optimizer"][str(i)], "param_state_sharding_type": _SHARDING})
    return TrainState.from_dict(json.loads((path / STATE_FILE).read_text()))


def _contents(trainable: Trainable, *, loading: bool) -> dict[str, Any]:
    """The sharded state dict of model and optimizer.

    Each inner optimizer is asked by itself: the keys that megatron-core 0.16.1 makes for several ("chained_0.") bind
    a checkpoint to their number. Names follow the model's parameters alone, so any layout can read them.
    """
    metadata = {
        "distrib_optim_sharding_type": _SHARDING,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    contents: dict[str, Any] = {
        name: without_base(chunk.sharded_state_dict(metadata=metadata)) for name, chunk in _named_chunks(trainable)
    }
    inner = trainable.optimizer.chained_optimizers
    parts = [one.sharded_state_dict(contents, is_loading=loading, metadata=metadata) for one in inner]
    contents["optimizer"] = {str(i): {"param_state": part["param_state"]} for i, part in enumerate(parts)}
    contents["optimizer_step"] = max(group.get("step", 0) for one in inner for group in one.optimizer.param_groups)
    return contents


def _named_chunks(trainable: Trainable) -> list[tuple[str, PairModel]]:
    """This rank's chunks under the names that the distributed optimizer looks for: model, or model0, model1, ..."""
    if len(trainable.chunks) == 1:
        return [("model", trainable.chunks[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(trainable.chunks)]
