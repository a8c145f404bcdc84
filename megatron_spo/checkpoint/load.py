"""Finds the newest undamaged checkpoint and loads it in any layout."""

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import load as load_distributed
from torch.distributed.checkpoint.api import CheckpointException

from megatron_spo.checkpoint import folder as checkpoint_folder
from megatron_spo.checkpoint.contents import contents, named_chunks
from megatron_spo.checkpoint.folder import Checkpoint, Damaged
from megatron_spo.errors import UserError
from megatron_spo.model.lora import load_beside_base
from megatron_spo.model.optimizer import Trainable

LOG = logging.getLogger(__name__)


def find(folder: Path, *, scales: bool) -> Checkpoint | None:
    """Returns the checkpoint to resume from: the one that `latest` names, or the newest undamaged one; None if there is
    no checkpoint.

    The ranks share the work of comparing checksums. Damaged checkpoints are logged and renamed.

    Args:
        folder: the `checkpoints` folder of the run.
        scales: whether checkpoints may contain fp8 scales.

    Raises:
        UserError: on every rank alike, if there are checkpoints and all are damaged.
    """
    lists: list[Any] = [None, None]
    if dist.get_rank() == 0:
        checkpoint_folder.remove_unfinished(folder)
        lists = list(checkpoint_folder.candidates(folder))
    dist.broadcast_object_list(lists, src=0)
    paths, oddities = lists
    for i, path in enumerate(paths):
        found, damage = _open_together(path, scales)
        if found is None:
            oddities.append(damage)
            continue
        if dist.get_rank() == 0:
            for oddity in oddities:
                LOG.warning(f"{oddity}; resuming from {path.name}")
            for damaged in paths[:i]:
                checkpoint_folder.set_aside(damaged)
        return found
    if paths:
        raise UserError(f"every checkpoint in {folder} is damaged: {'; '.join(oddities)}. Restore a copy of one, or "
                        "remove that folder to start from the first step")  # fmt: skip
    return None


def _open_together(path: Path, scales: bool) -> tuple[Checkpoint | None, str]:
    """Returns a checkpoint if every rank finds its part undamaged, else None and what is wrong."""
    found, damage = None, ""
    try:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        found = checkpoint_folder.open_checkpoint(path, part=rank, parts=ranks, scales=scales)
    except Damaged as error:
        damage = str(error)
    damages = [""] * dist.get_world_size()
    dist.all_gather_object(damages, damage)
    worst = next((message for message in damages if message), "")
    return (None if worst else found), worst


def load(found: Checkpoint, trainable: Trainable) -> None:
    """Loads model and optimizer from a checkpoint of any layout; `found.state` holds the rest.

    Raises:
        UserError: the checkpoint belongs to a different model.
    """
    try:
        sharded, optimizers = contents(trainable, loading=True)
        stored = load_distributed(sharded, str(found.path))
    except (Exception, CheckpointException) as error:  # many kinds; the files themselves are undamaged
        first_line = str(error).splitlines()[0][:200]
        raise UserError(
            f"{found.path} does not fit the model ({type(error).__name__}: {first_line}); set model.path to the model "
            "that this run was started with"
        ) from error
    for name, chunk in named_chunks(trainable):
        load_beside_base(chunk, stored[name])
    for i, optimizer in enumerate(optimizers):
        optimizer.fill(stored["optimizer"].get(str(i), {}), stored["optimizer_step"])
