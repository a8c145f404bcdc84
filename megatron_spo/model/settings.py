"""Makes Megatron's configuration of the model from this package's."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.schema import ParallelConfig, PrecisionConfig
from megatron_spo.config.topology import expert_tensor, stages_of
from megatron_spo.runtime.device import can_compile, uses_transformer_engine

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def gelu_tanh(x: Tensor) -> Tensor:
    """Returns GELU by its tanh approximation, as Gemma uses it."""
    return F.gelu(x, approximate="tanh")


def transformer_config(shape: ModelShape, parallel: ParallelConfig, precision: PrecisionConfig) -> TransformerConfig:
    """Returns Megatron's configuration of the model; no other code creates one."""
    dtype = DTYPES[precision.dtype]
    interleaved = parallel.virtual_pipeline is not None
    engine = uses_transformer_engine(precision, experts=shape.experts is not None)
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        layernorm_zero_centered_gamma=shape.gemma is not None,
        gated_linear_unit=True,
        activation_func=F.silu if shape.gemma is None else gelu_tanh,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        pipeline_model_parallel_layout=_pipeline_layout(shape, parallel),
        # With two stages, the previous and the next stage are the same rank, and a batched exchange would mix them up.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        **RECOMPUTE[parallel.recompute],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=False,  # rows are padded for the exchange between stages (build.py)
        batch_p2p_sync=False,  # against an error of old versions of torch; it waits for the GPU at each exchange
        moe_token_dispatcher_type="alltoall",
        **_experts(shape, parallel),
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # weights.py fills every tensor
        transformer_impl="transformer_engine" if engine else "local",
        **_fp8(precision),
        gradient_accumulation_fusion=False,  # build.py enables it where possible
        masked_softmax_fusion=False,  # part of Megatron's own attention, which is replaced
        # Compiled by torch; keeps two tensors less for the backward pass. Not for experts, as each of their numbers of
        # tokens could be compiled again.
        bias_activation_fusion=can_compile() and shape.gemma is None and shape.experts is None,
        bias_dropout_fusion=False,  # there is no dropout
        # Expects angles [T, 1, 1, d] by the token's index in the row, as RowRotary returns them.
        apply_rope_fusion=engine,
        finalize_model_grads_func=finalize_model_grads,
    )


def _fp8(precision: PrecisionConfig) -> dict[str, Any]:
    """Returns the part of Megatron's configuration for fp8. Only the layers' matrix products use fp8; weights stay in
    bf16, and attention, norms, embedding and log-prob head are unchanged."""
    if precision.recipe is None:
        return {}
    return {
        "fp8": precision.recipe.number_format,
        "fp8_recipe": precision.fp8,
        "fp8_amax_history_len": 1024,  # for "delayed": Transformer Engine's default; Megatron's is the last row only
        "fp8_amax_compute_algo": "max",
    }


def _experts(shape: ModelShape, parallel: ParallelConfig) -> dict[str, Any]:
    """Returns the part of Megatron's configuration for a mixture of experts."""
    if shape.experts is None:
        return {}
    return {
        "num_moe_experts": shape.experts.count,
        "moe_router_topk": shape.experts.per_token,
        "moe_ffn_hidden_size": shape.experts.ffn,
        # The softmax over the chosen logits equals the renormalised softmax over all logits.
        "moe_router_pre_softmax": not shape.experts.renormalised,
        "moe_router_dtype": "fp32",  # in bf16, logits of different experts tie and rounding would decide
        "moe_router_load_balancing_type": "none",  # see model/experts.py
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": expert_tensor(parallel),
    }


def _pipeline_layout(shape: ModelShape, parallel: ParallelConfig) -> list[list[str]] | None:
    """Returns the layers of each pipeline stage in Megatron's notation."""
    if parallel.pipeline == 1:
        return None
    counts = stages_of(shape, parallel)
    stages = [["decoder"] * count for count in counts]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]
