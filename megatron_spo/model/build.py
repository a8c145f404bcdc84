"""Build the policy for one rank, and fill it from a Hugging Face folder or at random.

Weights are addressed by the global key, shape and offset that Megatron's sharded state dict gives for each local
tensor, so the same code serves every tensor and pipeline layout, and each rank reads only its slices.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.schema import ParallelConfig, PrecisionConfig
from megatron_spo.config.topology import stage_layers
from megatron_spo.errors import UserError
from megatron_spo.model.attention import PairAttention, RowOnDevice
from megatron_spo.model.families import Mapping, mappings, padded_vocabulary
from megatron_spo.model.hf_files import HFWeights
from megatron_spo.model.logprobs import LogProbHead
from megatron_spo.model.tensors import PaddedVocabulary

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose gradient Megatron sums over the tensor-parallel ranks under sequence parallelism.

    Megatron's own wrapper of torch's norm refuses sequence parallelism (megatron-core 0.16.1).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class RowRotary(RotaryEmbedding):
    """Rotary angles [T, 1, 1, d] at the positions of a row; put in place by changing the class of the built one."""

    def get_rotary_seq_len(
        self, inference_context: Any, transformer: Any, transformer_input: Any, config: Any, row: RowOnDevice, **_: Any
    ) -> Tensor:
        assert row.positions is not None
        return row.positions

    def forward(self, positions: Tensor, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        angles = torch.outer(positions.to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None]


class PairModel(GPTModel):
    """GPTModel over packed rows: returns log-probabilities [1, E] on the last stage, hidden states elsewhere."""

    def __init__(
        self,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules,
        shape: ModelShape,
        *,
        vp_stage: int | None,
    ) -> None:
        super().__init__(
            config,
            spec,
            vocab_size=padded_vocabulary(shape, config.tensor_model_parallel_size),
            max_sequence_length=shape.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=shape.tied,
            vp_stage=vp_stage,
        )
        self.rotary_pos_emb.__class__ = RowRotary
        self.rotary_pos_emb.inv_freq = inverse_frequencies(shape).to(self.rotary_pos_emb.inv_freq.device)
        if self.post_process:
            self.output_layer.__class__ = LogProbHead
            self.output_layer.vocab = shape.vocab

    def forward(self, row: RowOnDevice) -> Tensor:
        """Log-probabilities [1, E] of the row's entries (last stage) or hidden states [T, 1, h]."""
        if self.post_process:
            self.output_layer.row = row
        return super().forward(row.tokens, None, None, packed_seq_params=row)


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """Rotary inverse frequencies [head_dim / 2], with the scaling that transformers defines for the model.

    Raises:
        UserError: a scaling that also rescales attention, which is not built.
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    plain = 1.0 / (shape.rope_theta**exponents)
    kind = (shape.rope_scaling or {}).get("rope_type", (shape.rope_scaling or {}).get("type", "default"))
    if kind == "default":
        return plain
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = dict(shape.raw)
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    if attention_factor != 1.0:
        raise UserError(f"rope scaling {kind!r} with an attention factor is not supported; use llama3 or linear")
    return frequencies.float()


def transformer_config(shape: ModelShape, parallel: ParallelConfig, precision: PrecisionConfig) -> TransformerConfig:
    """Megatron's configuration of the model: the one place that makes it."""
    dtype = DTYPES[precision.dtype]
    interleaved = parallel.virtual_pipeline is not None
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        pipeline_model_parallel_layout=_pipeline_layout(shape, parallel),
        # with two stages, a batched exchange would mix up what the same neighbour sends as previous and as next
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        **RECOMPUTE[parallel.recompute],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,  # rows are as long as their pairs
        moe_token_dispatcher_type="alltoall",  # variable lengths ask for it, even without experts
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # every tensor is filled from its global key below
        gradient_accumulation_fusion=False,  # the fusions need Transformer Engine or apex
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
    )


def _pipeline_layout(shape: ModelShape, parallel: ParallelConfig) -> list[list[str]] | None:
    """What each pipeline stage holds, in Megatron's words."""
    if parallel.pipeline == 1:
        return None
    layer = shape.hidden * (shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads) + 3 * shape.ffn)
    counts = stage_layers(shape.layers, parallel, head=shape.hidden * shape.vocab / layer)
    stages = [["decoder"] * count for count in counts]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def build_model(shape: ModelShape, config: TransformerConfig) -> list[PairModel]:
    """This rank's chunks of the model (one, unless the pipeline is interleaved), with memory for their weights but not
    their values."""
    chunks = config.virtual_pipeline_model_parallel_size
    return [_build_chunk(shape, config, vp_stage) for vp_stage in (range(chunks) if chunks else [None])]


def _build_chunk(shape: ModelShape, config: TransformerConfig, vp_stage: int | None) -> PairModel:
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.qk_norm)
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = SequenceParallelRMSNorm
    layer.self_attention.submodules.core_attention = PairAttention
    if shape.qk_norm:
        layer.self_attention.submodules.q_layernorm = SequenceParallelRMSNorm
        layer.self_attention.submodules.k_layernorm = SequenceParallelRMSNorm
    here = get_num_layers_to_build(config, vp_stage)
    block = TransformerBlockSubmodules(layer_specs=[spec] * here, layer_norm=SequenceParallelRMSNorm)
    model = PairModel(config, block, shape, vp_stage=vp_stage)
    _mark_tensor_parallel(model)
    return model if config.use_cpu_initialization else model.cuda()


def _mark_tensor_parallel(model: PairModel) -> None:
    """Tell the gradient norm which weights are parts of a larger one, so that it does not take them for duplicates.

    megatron-core 0.16.1 does so only where it initialises them itself.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding) and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=0, stride=1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=1, stride=1)


def _local_tensors(model: PairModel, shape: ModelShape) -> Iterator[tuple[Mapping, ShardedTensor, tuple[slice, ...]]]:
    """Each local tensor with its row of the family table and the part of the global tensor that it is."""
    table = {(row.key, row.layer): row for row in mappings(shape)}
    sharded = model.sharded_state_dict()
    apply_factories(sharded)
    for tensor in nested_values(sharded):
        if not isinstance(tensor, ShardedTensor):
            continue
        stacked = tensor.prepend_axis_num
        layer = int(tensor.global_offset[0]) if stacked else None
        index = tuple(
            slice(int(offset), int(offset) + int(size))
            for offset, size in zip(tensor.global_offset[stacked:], tensor.local_shape, strict=True)
        )
        yield table[tensor.key, layer], tensor, index


@torch.no_grad()
def load_hf_weights(model: PairModel, shape: ModelShape, folder: Path) -> None:
    """Fill the model from a Hugging Face folder; only this rank's slices are read.

    Raises:
        UserError: a tensor is missing, has another shape, or belongs to no part of the model.
    """
    with HFWeights(folder) as weights:
        known = {name for row in mappings(shape) for name in row.sources}
        ignored = {"lm_head.weight"} if shape.tied else set()
        stray = {n for n in weights.names() - known - ignored if not n.endswith("rotary_emb.inv_freq")}
        if stray:
            raise UserError(f"{folder} holds {min(stray)}, which a {shape.family} model of its config.json does "
                            f"not have ({len(stray)} such tensors)")  # fmt: skip
        for row, tensor, index in _local_tensors(model, shape):
            sources = [weights.slice(name) for name in row.sources]
            expected = row.transform.shapes(tuple(tensor.global_shape[tensor.prepend_axis_num :]))
            for name, source, shape_expected in zip(row.sources, sources, expected, strict=True):
                if tuple(source.get_shape()) != shape_expected:
                    raise UserError(f"{folder}: {name} has shape {tuple(source.get_shape())}, but its config.json "
                                    f"calls for {shape_expected}")  # fmt: skip
            tensor.data.copy_(row.transform.read(sources, index).view(tensor.data.shape))


@torch.no_grad()
def fill_randomly(model: PairModel, shape: ModelShape, seed: int) -> None:
    """Draw the weights as transformers does for a new model: normal matrices, norms of one, biases of zero.

    Each global tensor has a generator of its own, seeded by its name, so the model is the same in every layout.
    """
    for row, tensor, index in _local_tensors(model, shape):
        if row.is_norm:
            tensor.data.fill_(1.0)
        elif row.key.endswith("bias"):
            tensor.data.zero_()
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {row.key} {row.layer}".encode()))
            rows, columns = (int(size) for size in tensor.global_shape[tensor.prepend_axis_num :])
            full = torch.randn(rows, columns, generator=generator) * shape.initializer_range
            if isinstance(row.transform, PaddedVocabulary):
                full[shape.vocab :] = 0
            tensor.data.copy_(full[index].view(tensor.data.shape))
