"""Stand-ins for kernels that only exist on a GPU. They return tensors of the same shapes and keep the same tensors for
the backward pass; they compute nothing."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


class _Norm(torch.autograd.Function):
    """torch's fused RMSNorm: keeps its input and one fp32 number per token. A CPU runs several operators instead."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    return _Norm.apply(x, weight)


class _SegmentSums(torch.autograd.Function):
    """torch.segment_reduce, which has no rule for fake tensors."""

    @staticmethod
    def forward(ctx: Any, data: Tensor, count: int) -> Tensor:
        ctx.shape = data.shape
        return data.new_zeros((count, *data.shape[1:]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].new_zeros(ctx.shape), None


def _segment_reduce(data: Tensor, reduce: str, *, lengths: Tensor, unsafe: bool = False) -> Tensor:
    return _SegmentSums.apply(data, len(lengths))


def _product(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    return left.new_empty((left.shape[0], right.shape[1]), dtype=out_dtype)


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.rms_norm: _rms_norm,
    torch.segment_reduce: _segment_reduce,
}
"""Functions of torch, and what runs instead."""
OPERATORS: dict[str, Callable[..., Any]] = {
    "aten::mm.dtype": _product,  # matrix products with an fp32 result
    "aten::_fused_adamw_": lambda *a, **k: None,
}
"""Operators of torch, and what runs instead."""


def _swiglu(y: Tensor) -> Tensor:
    return y.new_empty((*y.shape[:-1], y.shape[-1] // 2))


def _weighted_swiglu(y: Tensor, weights: Tensor) -> Tensor:
    return _swiglu(y)


def _swiglu_back(gradient: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(y)


def _weighted_swiglu_back(gradient: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(weights)


COMPILED = {
    "megatron.core.fusions.fused_bias_swiglu": {
        "swiglu": _swiglu,
        "swiglu_back": _swiglu_back,
        "weighted_swiglu": _weighted_swiglu,
        "weighted_swiglu_back": _weighted_swiglu_back,
    }
}
"""Functions that torch.compile makes one kernel of on a GPU, without tensors in between."""


@contextmanager
def compiled() -> Iterator[None]:
    """Replaces compiled functions; raises AttributeError if Megatron-Core no longer has one."""
    with ExitStack() as stack:
        for module, functions in COMPILED.items():
            for name, function in functions.items():
                stack.enter_context(patch.object(import_module(module), name, function))
        yield


def converted(module: torch.nn.Module) -> torch.nn.Module:
    """Replaces `Module.bfloat16`, which does not work on fake parameters: exchanges those that are not bf16."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.dtype != torch.bfloat16:
                lowered = torch.nn.Parameter(parameter.detach().to(torch.bfloat16), parameter.requires_grad)
                lowered.__dict__.update(parameter.__dict__)
                part._parameters[name] = lowered
    return module
