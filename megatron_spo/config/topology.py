"""Arithmetic of the parallel layout."""

from dataclasses import dataclass

from megatron_spo.config.schema import ParallelConfig
from megatron_spo.errors import UserError


@dataclass(frozen=True)
class Topology:
    """Sizes of the parallel groups; `data` counts the replicas of the dense part of the model.

    The `expert` groups are cut from the same processes once more: tensor * context * data of them hold a layer, and
    each group of `expert` consecutive ones holds all of its experts once.
    """

    world: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    expert: int
    expert_tensor: int
    data: int


def stage_layers(layers: int, parallel: ParallelConfig, head: float) -> tuple[int, ...]:
    """Layers of each pipeline stage in the model's order, pipeline * virtual_pipeline of them.

    Where the stages do not divide the layers, each layer goes to the stage with the least work so far; the last one
    starts with the output layer, which weighs as much as `head` layers, and the first comes last among equals,
    because it holds the embedding.
    """
    if parallel.layers_per_stage is not None:
        return tuple(parallel.layers_per_stage)
    stages = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if layers % stages == 0:
        return (layers // stages,) * stages
    counts = [1] * stages
    for _ in range(layers - stages):
        work = [(count + (head if i == stages - 1 else 0.0), i == 0, i) for i, count in enumerate(counts)]
        counts[min(work)[2]] += 1
    return tuple(counts)


def expert_tensor(parallel: ParallelConfig) -> int:
    """Processes that share each expert's tensors: none where the experts themselves are shared out.

    Without that they are cut like a dense layer: Megatron-Core 0.16.1 takes gradients of whole experts for reduced
    over the tensor-parallel processes when there is one group of experts only.
    """
    return parallel.tensor if parallel.expert == 1 else 1


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
    layer_size = world_size // parallel.pipeline
    if layer_size % parallel.expert:
        raise UserError(
            f"parallel.expert = {parallel.expert} does not divide the {layer_size} processes that hold a layer "
            f"({world_size} processes / parallel.pipeline {parallel.pipeline}); the experts are shared out among "
            "tensor-, context- and data-parallel processes"
        )
    return Topology(
        world=world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual_pipeline or 1,
        context=parallel.context,
        expert=parallel.expert,
        expert_tensor=expert_tensor(parallel),
        data=world_size // model_size,
    )
