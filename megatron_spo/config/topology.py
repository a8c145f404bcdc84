"""Arithmetic of the parallel layout."""

from dataclasses import dataclass

from megatron_spo.config.schema import ParallelConfig
from megatron_spo.errors import UserError


@dataclass(frozen=True)
class Topology:
    """Sizes of the parallel groups; `data` counts the replicas of the model."""

    world: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    expert: int
    data: int


def make_topology(parallel: ParallelConfig, world_size: int) -> Topology:
    """The layout on `world_size` processes.

    Raises UserError, with the product written out, where they do not divide.
    """
    model_size = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_size:
        raise UserError(
            f"{world_size} process{'es' if world_size > 1 else ''} cannot be cut into "
            f"parallel.tensor * parallel.pipeline * parallel.context = "
            f"{parallel.tensor} * {parallel.pipeline} * {parallel.context} = {model_size}: "
            f"start a multiple of {model_size} (torchrun --nproc-per-node N) or make the layout smaller"
        )
    return Topology(
        world=world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual_pipeline or 1,
        context=parallel.context,
        expert=parallel.expert,
        data=world_size // model_size,
    )
