"""What the transformer layers of the model are made of."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.model.attention import PairAttention
from megatron_spo.model.experts import BalancedRouter


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose gradient Megatron sums over the tensor-parallel ranks under sequence parallelism.

    Megatron's own wrapper of torch's norm refuses sequence parallelism (megatron-core 0.16.1).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


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
    layer.self_attention.submodules.core_attention = PairAttention
    if shape.qk_norm:
        layer.self_attention.submodules.q_layernorm = SequenceParallelRMSNorm
        layer.self_attention.submodules.k_layernorm = SequenceParallelRMSNorm
    here = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * here, layer_norm=SequenceParallelRMSNorm)
