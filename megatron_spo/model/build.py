"""Builds the policy for one rank: a GPTModel over packed rows, with the log-prob head."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fp8_utils import TE_LINEAR_TYPES
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.topology import padded_vocabulary
from megatron_spo.errors import UserError
from megatron_spo.model.attention import RowOnDevice
from megatron_spo.model.experts import dispatch_without_gpu
from megatron_spo.model.layers import block_spec
from megatron_spo.model.logprobs import LogProbHead
from megatron_spo.runtime.megatron_versions import mark_tensor_parallel


class RowRotary(RotaryEmbedding):
    """Returns rotary angles [T, 1, 1, d] at the positions of a row, or [2, T, 1, 1, d] for two bases. It is installed
    by changing the class of the built module."""

    def get_rotary_seq_len(
        self, inference_context: Any, transformer: Any, transformer_input: Any, config: Any, row: RowOnDevice, **_: Any
    ) -> Tensor:
        assert row.positions is not None
        return row.positions

    def forward(self, positions: Tensor, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        angles = positions.to(self.inv_freq.dtype)[:, None] * self.inv_freq[..., None, :]
        return torch.cat((angles, angles), dim=-1)[..., None, None, :]


class PairModel(GPTModel):
    """GPTModel over packed rows; returns the output of its log-prob head on the last stage, hidden states elsewhere."""

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
        if self.pre_process and shape.gemma is not None:
            self.embedding.register_forward_hook(scale_by(shape.hidden**0.5))
        if self.post_process:
            self.output_layer.__class__ = LogProbHead
            self.output_layer.vocab = shape.vocab
            self.output_layer.softcap = shape.gemma.logit_softcap if shape.gemma else None

    def forward(self, row: RowOnDevice) -> Tensor:
        """Returns log-probs and entropies [2, E] of the row's entries (last stage) or hidden states [T, 1, h].

        Stages exchange hidden states of one length for all rows of a pass, padded with zeros that no layer sees. With
        the rows' own lengths, Megatron would first exchange the shapes, and wait for the GPU twice per exchange.
        """
        if self.post_process:
            self.output_layer.row = row
        padding = self._padding(row) if self.config.num_moe_experts else None
        split = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        assert row.tokens is not None
        if not self.pre_process and row.exchanged > row.tokens.shape[1]:
            self.set_input_tensor(self.decoder.input_tensor[: row.tokens.shape[1] // split])
        out: Tensor = super().forward(row.tokens, None, None, packed_seq_params=row, padding_mask=padding)
        if self.post_process or row.exchanged == row.tokens.shape[1]:
            return out
        return F.pad(out, (0, 0, 0, 0, 0, row.exchanged // split - len(out)))

    def _padding(self, row: RowOnDevice) -> Tensor:
        """Returns the row's padding mask [1, T] for the routers; under sequence parallelism, this rank's part.

        Megatron's first stage splits it itself, the others do not (megatron-core 0.16.1, gpt_model.py, _preprocess).
        """
        assert row.padding is not None
        if self.pre_process or not self.config.sequence_parallel:
            return row.padding
        rank = parallel_state.get_tensor_model_parallel_rank()
        return row.padding.chunk(self.config.tensor_model_parallel_size, dim=1)[rank]


def scale_by(factor: float) -> Callable[..., Tensor]:
    """Returns a forward hook that scales the embedding; the factor is rounded to the model's precision, as in
    transformers."""
    return lambda module, inputs, hidden: hidden * float(torch.tensor(factor, dtype=hidden.dtype))


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """Returns rotary inverse frequencies [head_dim / 2] with the scaling that transformers defines for the model, or
    [2, head_dim / 2] if layers with a sliding window have their own, in the second row.

    Raises:
        UserError: the scaling also rescales attention, which is not supported.
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    plain = 1.0 / (shape.rope_theta**exponents)
    if shape.gemma is not None and shape.gemma.local_theta is not None:
        return torch.stack([_scaled(plain, shape), 1.0 / (shape.gemma.local_theta**exponents)])
    return _scaled(plain, shape)


def _scaled(plain: Tensor, shape: ModelShape) -> Tensor:
    scaling = shape.rope_scaling
    if scaling is None:
        return plain
    if scaling["rope_type"] == "linear":
        return plain / scaling["factor"]
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = dict(shape.raw)
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    if attention_factor != 1.0:
        raise UserError(
            f"rope scaling {scaling['rope_type']!r} with an attention factor is not supported; use llama3 or linear"
        )
    return frequencies.float()


def build_model(shape: ModelShape, config: TransformerConfig) -> list[PairModel]:
    """Builds this rank's chunks of the model (one, unless the pipeline is interleaved), with memory for their weights
    but not their values."""
    chunks = config.virtual_pipeline_model_parallel_size
    return [_build_chunk(shape, config, vp_stage) for vp_stage in (range(chunks) if chunks else [None])]


def _build_chunk(shape: ModelShape, config: TransformerConfig, vp_stage: int | None) -> PairModel:
    model = PairModel(config, block_spec(shape, config, vp_stage), shape, vp_stage=vp_stage)
    _mark_tensor_parallel(model)
    _accumulate_in_place(model)
    if shape.gemma is not None:
        for layer in model.decoder.layers:
            # Megatron enables gradients for the residual addition even under no_grad (megatron-core 0.16.1,
            # transformer_layer.py). With a norm in it, a forward pass alone would keep tensors for the backward pass.
            layer.bias_dropout_add_exec_handler = nullcontext
    if config.use_cpu_initialization:
        dispatch_without_gpu(model)
    return model if config.use_cpu_initialization else model.cuda()


def _mark_tensor_parallel(model: PairModel) -> None:
    """Marks the weights that are parts of a larger one, so that the gradient norm does not treat them as duplicates.

    Experts are marked too, even whole ones, as their optimizer has a shard of each on one rank only. Transformer
    Engine's layers are always marked.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding) and module.weight is not None:
            mark_tensor_parallel(module.weight, axis=0)
        elif isinstance(module, RowParallelLinear):
            mark_tensor_parallel(module.weight, axis=1)


def _accumulate_in_place(model: PairModel) -> None:
    """Lets Transformer Engine's layers add a row's gradient to Megatron's fp32 buffer within the matrix product.

    It is set here, because Megatron's configuration key would require an apex kernel for the output layer
    (megatron-core 0.16.1, tensor_parallel/layers.py). The first row of a pass overwrites the buffer. Therefore a pass
    is one run of the pipeline over zeroed buffers (train/step.py).
    """
    for module in model.modules():
        if isinstance(module, TE_LINEAR_TYPES):
            module.fuse_wgrad_accumulation = True
