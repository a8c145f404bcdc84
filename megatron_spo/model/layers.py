"""The modules of the model's transformer layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.model.attention import PairAttention
from megatron_spo.model.experts import BalancedRouter
from megatron_spo.runtime.megatron_versions import submodules


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose gradient Megatron sums over the tensor-parallel ranks under sequence parallelism. A zero-centred
    norm multiplies by 1 + weight, in fp32.

    Megatron's own wrapper of torch's norm supports neither (megatron-core 0.16.1).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        if not self.zero_centered:
            return super().forward(x)
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).type_as(x)


class NormedResidual(torch.nn.Module):
    """Adds the norm of a block's output to the residual. It replaces Megatron's function that adds bias and dropout,
    which are not used here, and has its signature."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = SequenceParallelRMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        return lambda output_with_bias, residual, dropout: residual + self.norm(output_with_bias[0])


class TwoBaseAttention(SelfAttention):
    """Self-attention that selects its part of the rotary angles [2, T, 1, 1, d]: the second in sliding-window
    layers."""

    def __init__(self, *arguments: Any, sliding_layers: tuple[int, ...], **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._own = int(self.layer_number - 1 in sliding_layers)

    def forward(self, *arguments: Any, rotary_pos_emb: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        return super().forward(*arguments, rotary_pos_emb=rotary_pos_emb[self._own], **more)


def block_spec(shape: ModelShape, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Returns the spec of one chunk's layers, with Megatron's or Transformer Engine's linear layers.

    Core attention and the norms outside the linear layers come from this package in both. The parameters have the same
    names in the sharded state dict (families.py), including the `_extra_state` of each linear layer: Transformer Engine
    stores scales of delayed fp8 there, which Megatron's layers ignore; theirs is empty. Experts are always Megatron's.
    """
    if config.transformer_impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.qk_norm)
        layer = spec.submodules  # its linear layers include the norm before them
    else:
        experts = shape.experts.count if shape.experts else None
        spec = get_gpt_layer_local_spec(
            num_experts=experts, moe_grouped_gemm=False, normalization="RMSNorm", qk_layernorm=shape.qk_norm
        )
        layer = spec.submodules
        layer.input_layernorm = layer.pre_mlp_layernorm = SequenceParallelRMSNorm
        if experts:
            submodules(layer.mlp).router = BalancedRouter
            layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")  # no linear layer follows that could include it
    layer.self_attention.submodules.core_attention = partial(PairAttention, shape=shape)
    if shape.qk_norm:
        layer.self_attention.submodules.q_layernorm = SequenceParallelRMSNorm
        layer.self_attention.submodules.k_layernorm = SequenceParallelRMSNorm
    if shape.gemma is not None:
        _as_gemma(layer, shape, config)
    here = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * here, layer_norm=SequenceParallelRMSNorm)


def _as_gemma(layer: TransformerLayerSubmodules, shape: ModelShape, config: TransformerConfig) -> None:
    """Adds norms after attention and feed-forward network, with NeMo's keys, and a second rotary base."""
    for place, linear in (("self_attn_bda", "self_attention.linear_proj"), ("mlp_bda", "mlp.linear_fc2")):
        setattr(layer, place, ModuleSpec(NormedResidual, params={"config": config}))
        layer.sharded_state_dict_keys_map[f"{place}.norm."] = f"{linear}.post_layernorm."
    if shape.gemma is not None and shape.gemma.local_theta is not None:
        layer.self_attention.module = TwoBaseAttention
        layer.self_attention.params["sliding_layers"] = shape.sliding_layers
