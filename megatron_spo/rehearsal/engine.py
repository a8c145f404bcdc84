"""A stand-in for the layers of Transformer Engine, which cannot be imported without its GPU libraries.

It has the parameters and communication of Transformer Engine's layers and keeps the same tensors for the backward pass
(transformer-engine 2.11, pytorch/module/layernorm_linear.py and linear.py), but computes nothing. In fp8, inputs are
kept in one byte per number, and every weight has an fp8 copy and the transpose of that for the backward pass. A weight
gradient is added to Megatron's buffer within the product.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor
from torch.nn import Module, Parameter


@dataclass(frozen=True)
class Product:
    """How a linear layer runs on this rank."""

    column: bool
    split: int
    sequence: bool
    fp8: bool

    def _group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    def gathered(self, part: Tensor) -> Tensor:
        """Returns the tokens of all ranks [T, ...] of this rank's part."""
        whole = part.new_empty((part.shape[0] * self.split, *part.shape[1:]))
        dist.all_gather_into_tensor(whole, part.contiguous(), group=self._group())
        return whole

    def summed(self, whole: Tensor) -> Tensor:
        """Returns this rank's part of the sum over the ranks, which is the whole without sequence parallelism."""
        if not self.sequence:
            if self.split > 1:
                dist.all_reduce(whole, group=self._group())
            return whole
        part = whole.new_empty((whole.shape[0] // self.split, *whole.shape[1:]))
        dist.reduce_scatter_tensor(part, whole, group=self._group())
        return part

    def input_of(self, x: Tensor) -> Tensor:
        """Returns the input of the product as it is kept."""
        return torch.empty_like(x, dtype=torch.uint8) if self.fp8 else x


class _Linear(torch.autograd.Function):
    """x [T, 1, in] times weight [out, in], after a norm if there is one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor | None, weight: Tensor, bias: Tensor | None, product: Product
    ) -> Tensor:
        scale = None if norm is None else x.new_empty(x.shape[:-1], dtype=torch.float32)
        into = product.input_of(x if norm is None else torch.empty_like(x))
        whole = product.gathered(into) if product.column and product.sequence else into
        out = x.new_empty((*whole.shape[:-1], weight.shape[0]))
        del whole
        kept = into if weight.requires_grad else None
        ctx.save_for_backward(None if norm is None else x, scale, norm, weight, bias, kept)
        ctx.product = product
        return out if product.column else product.summed(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, _, norm, weight, bias, kept = ctx.saved_tensors
        product: Product = ctx.product
        gradient = gradients[0]
        if not product.column and product.sequence:
            gradient = product.gathered(gradient)
        quantized = gradient.new_empty((2, *gradient.shape), dtype=torch.uint8) if product.fp8 else None
        if kept is not None and product.column and product.sequence:
            kept = product.gathered(kept)
        d_in = gradient.new_empty((*gradient.shape[:-1], weight.shape[1]))
        if product.column:
            d_in = product.summed(d_in)
        del quantized, kept
        d_norm = None if norm is None else torch.empty_like(norm)
        if norm is not None:
            d_in = torch.empty_like(x)
        d_weight = None
        if weight.requires_grad:
            weight.grad_added_to_main_grad = True
            d_weight = _unused(weight)
        return d_in, d_norm, d_weight, None if bias is None else torch.empty_like(bias), None


_UNUSED: dict[tuple[torch.Size, torch.dtype], Tensor] = {}


def _unused(weight: Tensor) -> Tensor:
    """Returns a tensor for autograd in place of the weight gradient; there is one for all weights of a shape."""
    key = weight.shape, weight.dtype
    if key not in _UNUSED:
        _UNUSED[key] = torch.empty_like(weight)
    return _UNUSED[key].detach()


class _StandIn(Module):
    """Parameters of a linear layer on this rank; `layer_norm_weight` if it includes the norm before it."""

    column = True
    has_norm = False

    def __init__(self, inputs: int, outputs: int, *, config: TransformerConfig, bias: bool = False, **_: Any) -> None:
        super().__init__()
        split, dtype = config.tensor_model_parallel_size, config.params_dtype
        self._product = Product(self.column, split, config.sequence_parallel, config.fp8 is not None)
        shape = (outputs // split, inputs) if self.column else (outputs, inputs // split)
        self.weight = Parameter(torch.empty(shape, dtype=dtype))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.bias = Parameter(torch.empty(shape[0], dtype=dtype)) if bias and self.column else None
        self.layer_norm_weight = Parameter(torch.empty(inputs, dtype=dtype)) if self.has_norm else None
        if self.layer_norm_weight is not None:
            self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        copies = (2, *shape) if config.fp8 else (0,)
        self.register_buffer("quantized", torch.empty(copies, dtype=torch.uint8), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return _Linear.apply(x, self.layer_norm_weight, self.weight, self.bias, self._product), None


class ColumnWithNorm(_StandIn):
    """In place of TELayerNormColumnParallelLinear."""

    has_norm = True


class Row(_StandIn):
    """In place of TERowParallelLinear."""

    column = False


class _Rotated(torch.autograd.Function):
    """The fused rotary embedding, which keeps the angles."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return torch.empty_like(t)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(gradients[0]), None


def _layer_spec(*, qk_layernorm: bool, **_: Any) -> Any:
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_layernorm)
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    for part in (layer.self_attention.submodules, layer.mlp.submodules):
        for name in ("linear_qkv", "linear_fc1"):
            if hasattr(part, name):
                setattr(part, name, ColumnWithNorm)
        for name in ("linear_proj", "linear_fc2"):
            if hasattr(part, name):
                setattr(part, name, Row)
    return spec


@contextmanager
def engine() -> Iterator[None]:
    """Replaces Transformer Engine's layers, rotary embedding, Adam and norm within the context."""
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_spo.model import adamw, layers, settings

    def rotate(t: Tensor, angles: Tensor, **_: Any) -> Tensor:
        return _Rotated.apply(t, angles)

    with ExitStack() as stack:
        stack.callback(_UNUSED.clear)
        for owner, name, replacement in (
            (settings, "uses_transformer_engine", lambda *_, **__: True),
            (layers, "get_gpt_layer_with_transformer_engine_spec", _layer_spec),
            (rope_utils, "fused_apply_rotary_pos_emb", rotate),
            (adamw, "adamw", lambda *_, **__: None),
        ):
            stack.enter_context(patch.object(owner, name, replacement))
        yield
