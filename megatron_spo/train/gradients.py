"""Gradients as vectors: keep, give back, multiply, and step along one for a while.

A gradient is the list of fp32 tensors that Megatron's distributed optimizer steps with on this rank: its shard of the
reduced gradient. One pass's gradient must be taken before the next pass reuses the buffers, whose content is then
already reduced and must not be reduced again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_spo.model.optimizer import Trainable

Gradient = list[Tensor]


def clear(trainable: Trainable) -> None:
    """Empty the buffers before a pass."""
    for chunk in trainable.wrapped:
        chunk.zero_grad_buffer()
    trainable.optimizer.zero_grad()


def take(trainable: Trainable) -> Gradient:
    """A copy of this rank's shard of the gradient that the last pass left (after prepare_grads)."""
    return [_grad(parameter).clone() for parameter in _parameters(trainable)]


def give(trainable: Trainable, parts: Sequence[tuple[float, Gradient]]) -> None:
    """Make the sum of coefficient * gradient the one that the optimizer will step with (after prepare_grads)."""
    for i, parameter in enumerate(_parameters(trainable)):
        total = _grad(parameter).zero_()
        for coefficient, gradient in parts:
            total.add_(gradient[i], alpha=coefficient)


def dot(trainable: Trainable, a: Gradient, b: Gradient) -> float:
    """Inner product of two gradients over all ranks, each parameter counted once."""
    total = torch.zeros((), dtype=torch.float64, device=next(trainable.chunks[0].parameters()).device)
    for parameter, left, right in zip(_parameters(trainable), a, b, strict=True):
        group = parallel_state.get_tensor_model_parallel_group()
        if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, group):
            total += (left.double() * right.double()).sum()
    dist.all_reduce(total)
    return float(total)


@contextmanager
def shifted(trainable: Trainable, gradient: Gradient, step: float) -> Iterator[None]:
    """Within the context the model's weights are theta - step * gradient; afterwards they are theta, bit for bit.

    Only this rank's shard of the fp32 main parameters is kept aside, not the weights.
    """
    parameters = _parameters(trainable)
    kept = [parameter.detach().clone() for parameter in parameters]
    for parameter, direction in zip(parameters, gradient, strict=True):
        parameter.data.add_(direction, alpha=-step)
    _spread(trainable)
    try:
        yield
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)
        _spread(trainable)


def _spread(trainable: Trainable) -> None:
    """Bring the main parameters into the model, on all data-parallel ranks (what Megatron does after a step)."""
    for inner in trainable.optimizer.chained_optimizers:
        inner._copy_main_params_to_model_params()
    for chunk in trainable.wrapped:
        chunk.start_param_sync(force_sync=True)
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            # megatron-core 0.16.1 would take these weights for those of the optimizer step that follows, and with
            # overlap_param_gather never gather the latter
            group.param_gather_dispatched = False


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _parameters(trainable: Trainable) -> list[Tensor]:
    """This rank's shards of the main parameters, experts (which have an optimizer of their own) included."""
    return [parameter for inner in trainable.optimizer.chained_optimizers for parameter in inner.get_parameters()]
