"""Makes a model trainable with Megatron's data parallelism and optimizer; the learning rate schedule."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_spo.config.schema import OptimizerConfig
from megatron_spo.model.adamw import keep_step_in_group
from megatron_spo.model.build import PairModel
from megatron_spo.model.logprobs import adds_on_cpu, mark_added_on_cpu

GRADIENT_PIECE = 2**18
"""Numbers of a gradient that a CPU converts at a time; 1 MiB in fp32 stays in its cache."""


@dataclass(frozen=True)
class Trainable:
    """This rank's chunks of the model (one, unless the pipeline is interleaved), wrapped, and their optimizer."""

    chunks: list[PairModel]
    wrapped: list[DistributedDataParallel]
    optimizer: Any
    config: TransformerConfig

    def gather_weights(self) -> None:
        """Updates the weights on every rank now, instead of in the next forward pass."""
        for chunk in self.wrapped:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def lower_precision(chunk: PairModel, config: TransformerConfig) -> torch.nn.Module:
    """Returns a chunk in its training precision, for forward passes only or before `make_trainable`."""
    return Float16Module(config, chunk) if config.bf16 else chunk


def make_trainable(
    chunks: list[PairModel], config: TransformerConfig, optimizer: OptimizerConfig, *, overlap: bool
) -> Trainable:
    """Wraps the chunks in Megatron's DDP, which reduces gradients in fp32, and creates the distributed optimizer.

    `overlap`: communicate gradients and weights during the computation.
    """
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    wrapped = [
        DistributedDataParallel(config, ddp, lower_precision(chunk, config), disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    for chunk in chunks:
        _add_gradients_by_pieces(chunk)
    made = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.betas[0],
            adam_beta2=optimizer.betas[1],
            adam_eps=optimizer.eps,
            clip_grad=optimizer.clip_grad,
            params_dtype=config.params_dtype,
            bf16=config.bf16,
            use_distributed_optimizer=True,
            overlap_param_gather=overlap,
        ),
        wrapped,
        use_gloo_process_groups=False,
    )
    if overlap:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    keep_step_in_group(made)
    return Trainable(chunks, wrapped, made, config)


def _add_gradients_by_pieces(chunk: PairModel) -> None:
    """Lets a CPU add each bf16 gradient to Megatron's fp32 buffer piece by piece, and that of the embedding by rows.

    Megatron adds it with one operation, for which torch converts the whole gradient into new memory; it takes ten times
    as long. The sums are the same. As with a gradient that a matrix product has added, Megatron then adds nothing.
    """

    def add(parameter: Any) -> None:
        total, gradient = parameter.main_grad, parameter.grad
        if gradient.is_sparse:
            total.index_add_(0, gradient._indices()[0], gradient._values().float())
        else:
            pieces = gradient.reshape(-1).split(GRADIENT_PIECE)
            for part, piece in zip(total.view(-1).split(GRADIENT_PIECE), pieces, strict=True):
                part.add_(piece.float())
        parameter.grad_added_to_main_grad = True

    for parameter in chunk.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16 and not parameter.is_cuda:
            parameter.register_post_accumulate_grad_hook(add)
            mark_added_on_cpu(parameter)
            parameter.zero_out_wgrad = False  # set for tied weights; Megatron would add their gradients once more
    if chunk.pre_process and adds_on_cpu(chunk.embedding.word_embeddings.weight):
        chunk.embedding.word_embeddings.__class__ = EmbeddingByRows


class EmbeddingByRows(VocabParallelEmbedding):
    """Embedding with a sparse gradient, unless the vocabulary is split: one of the whole vocabulary takes memory and
    time even for a few tokens."""

    def forward(self, input_: Tensor) -> Tensor:
        if self.tp_group.size() > 1:
            return super().forward(input_)
        return F.embedding(input_, self.weight, sparse=True)


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig) -> float:
    """Returns the learning rate of the step with index `step` (from 0) of `steps`.

    The warm-up is linear and reaches the peak at its last step: lr * (step + 1) / warmup_steps. The decay covers the
    remaining steps, from the peak to min_lr_ratio * lr at the last step.
    """
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.decay == "constant":
        return optimizer.lr
    progress = (step - optimizer.warmup_steps) / max(1, steps - 1 - optimizer.warmup_steps)
    left = 1 - progress if optimizer.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return optimizer.lr * (optimizer.min_lr_ratio + (1 - optimizer.min_lr_ratio) * left)
