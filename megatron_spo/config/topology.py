"""Computes sizes of the parallel layout."""

from dataclasses import dataclass

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.schema import ParallelConfig
from megatron_spo.errors import UserError


@dataclass(frozen=True)
class Topology:
    """Sizes of the parallel groups. `data` is the number of replicas of the dense part of the model.

    The `expert` groups split the same processes in another way: tensor * context * data processes hold a layer, and
    each group of `expert` consecutive processes holds all experts of that layer once.
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
    """Returns the number of layers of each of the pipeline * virtual_pipeline stages, in model order.

    If the number of layers is not a multiple of the number of stages, each layer goes to the stage with the least work
    so far. The last stage starts with the output layer, whose work is that of `head` layers. Among equal stages, the
    first stage comes last, because it holds the embedding.
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
    """Returns the number of processes that share each expert's tensors: 1 with expert parallelism.

    Without expert parallelism, experts are split like a dense layer, because Megatron-Core 0.16.1 assumes that
    gradients of whole experts are already reduced over the tensor-parallel processes if there is only one expert group.
    """
    return parallel.tensor if parallel.expert == 1 else 1


def make_topology(parallel: ParallelConfig, world_size: int, *, in_slurm: bool = False) -> Topology:
    """Returns the layout on `world_size` processes. `in_slurm`: messages are for a SLURM job.

    Raises:
        UserError: `world_size` is not a multiple of the size of the layout.
    """
    model_size = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_size:
        start = "sbatch --nodes=M --ntasks-per-node=N" if in_slurm else "torchrun --nproc-per-node N"
        raise UserError(
            f"{world_size} process{'es are' if world_size > 1 else ' is'} not a multiple of "
            f"parallel.tensor * parallel.pipeline * parallel.context = "
            f"{parallel.tensor} * {parallel.pipeline} * {parallel.context} = {model_size}; "
            f"start a multiple of {model_size} processes ({start}), or set a smaller layout"
        )
    layer_size = world_size // parallel.pipeline
    if layer_size % parallel.expert:
        raise UserError(
            f"parallel.expert = {parallel.expert} does not divide the {layer_size} processes that hold a layer "
            f"({world_size} processes / parallel.pipeline {parallel.pipeline}); set parallel.expert to a divisor of "
            f"{layer_size}"
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


def stages_of(shape: ModelShape, parallel: ParallelConfig) -> tuple[int, ...]:
    """Returns the number of layers of each stage; the output layer is weighed by its matrix products."""
    layer = shape.attention_weights + 3 * shape.hidden * shape.active_ffn
    return stage_layers(shape.layers, parallel, head=shape.hidden * shape.vocab / layer)


def padded_vocabulary(shape: ModelShape, tensor_parallel: int) -> int:
    """Returns the rows of the embedding: the vocabulary rounded up to the same number on every tensor-parallel rank."""
    multiple = 128 if 128 % tensor_parallel == 0 else 128 * tensor_parallel
    return -(-shape.vocab // multiple) * multiple
