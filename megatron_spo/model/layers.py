"""What the transformer layers of the model are made of."""

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


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose gradient Megatron sums over the tensor-parallel ranks under sequence parallelism; a zero-centred
    one multiplies by 1 + weight, in fp32.

    Megatron's own wrapper of torch's norm refuses both (megatron-core 0.16.1).
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
    """The residual plus the norm of what a block puts out, in the place and with the signature of Megatron's function
    that adds bias and dropout, of which there are none."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = SequenceParallelRMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        return lambda output_with_bias, residual, dropout: residual + self.norm(output_with_bias[0])


class TwoBaseAttention(SelfAttention):
    """Self-attention that takes its own of the rotary angles [2, T, 1, 1, d]: the second in sliding layers."""

    def __init__(self, *arguments: Any, sliding_layers: tuple[int, ...], **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._own = int(self.layer_number - 1 in sliding_layers)

    def forward(self, *arguments: Any, rotary_pos_emb: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        return super().forward(*arguments, rotary_pos_emb=rotary_pos_emb[self._own], **more)


def block_spec(shape: ModelShape, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of one chunk of the model, of Megatron's own linear layers or Transformer Engine's.

    Attention's core and the norms outside the linear layers are ours in both, and the parameters have the same names in
    the sharded state dict (families.py), also the `_extra_state` of each linear layer: what Transformer Engine puts
    there (scales of delayed fp8) Megatron's layers ignore, and theirs is empty. Experts are Megatron's own alone.
    """
    if config.transformer_impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.qk_norm)
        layer = spec.submodules  # the linear layers begin with the norm
    else:
        experts = shape.experts.count if shape.experts else None
        spec = get_gpt_layer_local_spec(
            num_experts=experts, moe_grouped_gemm=False, normalization="RMSNorm", qk_layernorm=shape.qk_norm
        )
        layer = spec.submodules
        layer.input_layernorm = layer.pre_mlp_layernorm = SequenceParallelRMSNorm
        if experts:
            layer.mlp.submodules.router = BalancedRouter
            layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")  # no linear layer to be fused into behind it
    layer.self_attention.submodules.core_attention = partial(PairAttention, shape=shape)
    if shape.qk_norm:
        layer.self_attention.submodules.q_layernorm = SequenceParallelRMSNorm
        layer.self_attention.submodules.k_layernorm = SequenceParallelRMSNorm
    if shape.gemma is not None:
        _as_gemma(layer, shape, config)
    here = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * here, layer_norm=SequenceParallelRMSNorm)


def _as_gemma(layer: TransformerLayerSubmodules, shape: ModelShape, config: TransformerConfig) -> None:
    """Norms behind attention and feed-forward network, under the keys that NeMo gives them, and two rotary bases."""
    for place, linear in (("self_attn_bda", "self_attention.linear_proj"), ("mlp_bda", "mlp.linear_fc2")):
        setattr(layer, place, ModuleSpec(NormedResidual, params={"config": config}))
        layer.sharded_state_dict_keys_map[f"{place}.norm."] = f"{linear}.post_layernorm."
    if shape.gemma is not None and shape.gemma.local_theta is not None:
        layer.self_attention.module = TwoBaseAttention
        layer.self_attention.params["sliding_layers"] = shape.sliding_layers
