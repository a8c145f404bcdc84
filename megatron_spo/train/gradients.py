"""Vector operations on gradients: copy, set, inner product, and a temporary step along one.

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
CHUNK = 2**24
"""Numbers of a gradient that are converted to fp64 at a time (128 MiB)."""


def clear(trainable: Trainable) -> None:
    """Zeroes the gradient buffers before a pass."""
    for chunk in trainable.wrapped:
        chunk.zero_grad_buffer()
    trainable.optimizer.zero_grad()


def take(trainable: Trainable) -> Gradient:
    """Returns a copy of this rank's shard of the last pass's gradient; call it after `prepare_grads`."""
    return [_grad(parameter).clone() for parameter in _parameters(trainable)]


def give(trainable: Trainable, parts: Sequence[tuple[float, Gradient]]) -> None:
    """Sets the optimizer's gradient to the sum of coefficient * gradient; call it after `prepare_grads`."""
    for i, parameter in enumerate(_parameters(trainable)):
        total = _grad(parameter).zero_()
        for coefficient, gradient in parts:
            total.add_(gradient[i], alpha=coefficient)


def dot(trainable: Trainable, a: Gradient, b: Gradient) -> float:
    """Returns the inner product of two gradients over all ranks, counting each parameter once."""
    total = torch.zeros((), dtype=torch.float64, device=next(trainable.chunks[0].parameters()).device)
    for parameter, left, right in zip(_parameters(trainable), a, b, strict=True):
        if _is_counted(parameter):
            for some, others in zip(left.split(CHUNK), right.split(CHUNK), strict=True):
                total += some.double() @ others.double()
    dist.all_reduce(total)
    return float(total)


def norm(trainable: Trainable) -> float:
    """Returns the norm of the optimizer's gradient over all ranks, counting each parameter once.

    The process waits for the GPU once. Megatron's own function waits once per parameter if neither Transformer Engine
    nor apex is installed (megatron-core 0.16.1, utils.py, local_multi_tensor_l2_norm).
    """
    own = [
        parameter.grad for parameter in _parameters(trainable) if parameter.grad is not None and _is_counted(parameter)
    ]
    device = next(trainable.chunks[0].parameters()).device
    squared = torch.nn.utils.get_total_norm(own).square() if own else torch.zeros((), device=device)
    dist.all_reduce(squared)
    return float(squared.sqrt())


@contextmanager
def shifted(trainable: Trainable, gradient: Gradient, step: float) -> Iterator[None]:
    """Sets the model's weights to theta - step * gradient within the context and restores theta bit for bit afterwards.

    Only this rank's shard of the fp32 main parameters is saved for that, not the weights.
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
    """Copies the main parameters into the model on all data-parallel ranks, as Megatron does after a step."""
    for inner in trainable.optimizer.chained_optimizers:
        inner._copy_main_params_to_model_params()
    for chunk in trainable.wrapped:
        chunk.start_param_sync(force_sync=True)
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            # With overlap_param_gather, megatron-core 0.16.1 would take these weights for those after the next
            # optimizer step and would never gather the latter.
            group.param_gather_dispatched = False


def _is_counted(parameter: Tensor) -> bool:
    """Returns whether this rank counts a parameter: no other rank holds a copy that is counted."""
    group = parallel_state.get_tensor_model_parallel_group()
    return bool(param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, group))


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _parameters(trainable: Trainable) -> list[Tensor]:
    """Returns this rank's shards of the main parameters, including experts, which have a separate optimizer."""
    return [parameter for inner in trainable.optimizer.chained_optimizers for parameter in inner.get_parameters()]
