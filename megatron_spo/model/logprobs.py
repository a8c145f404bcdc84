"""Log-probabilities of scored tokens, from hidden states, without a [tokens, vocabulary] tensor.

The output layer is split over the tensor-parallel group by vocabulary. Logits exist for one chunk of positions at a
time; the backward pass computes them again from the stored log-normaliser.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_spo.model.attention import RowOnDevice

LOGITS_PER_CHUNK = 2**24
"""Logits held at a time on one rank (64 MiB in fp32)."""


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """fp32 [n, V/tp] logits of hidden states [n, h] and weight [V/tp, h] in the model's precision."""
    if hidden.dtype == torch.float32:
        return hidden @ weight.t()
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return hidden.float() @ weight.float().t()


class VocabParallelLogProb(torch.autograd.Function):
    """log softmax(hidden @ weight^T)[target], with the vocabulary spread over a process group."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, first_row: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        """Hidden [E, h], weight [V_local, h] (rows from `first_row` of the vocabulary), targets [E] -> fp32 [E]."""
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty_like(logprobs)
        for part in _chunks(len(targets), len(weight)):
            logits = _logits(hidden[part], weight)
            local, here = _local(targets[part], first_row, len(weight))
            peak = logits.amax(-1) if len(weight) else logits.new_full((len(logits),), -torch.inf)
            if group is not None:
                dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
            target_logit = logits.new_zeros(len(logits))
            target_logit[here] = logits[here, local[here]]
            sums = torch.stack([(logits - peak[:, None]).exp_().sum(-1), target_logit])
            if group is not None:
                dist.all_reduce(sums, group=group)
            normaliser[part] = peak + sums[0].log()
            logprobs[part] = sums[1] - normaliser[part]
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.first_row, ctx.group = first_row, group
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in _chunks(len(targets), len(weight)):
            scale = gradients[0][part]
            d_logits = (_logits(hidden[part], weight) - normaliser[part, None]).exp_().mul_(-scale[:, None])
            local, here = _local(targets[part], ctx.first_row, len(weight))
            d_logits[here, local[here]] += scale[here]
            d_hidden[part] = (d_logits.to(weight.dtype) @ weight).to(hidden.dtype)
            if d_weight is not None:
                d_weight += d_logits.t() @ hidden[part].float()
        if ctx.group is not None:
            dist.all_reduce(d_hidden, group=ctx.group)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


def _chunks(entries: int, vocabulary: int) -> list[slice]:
    size = max(16, LOGITS_PER_CHUNK // max(1, vocabulary))
    return [slice(i, min(i + size, entries)) for i in range(0, entries, size)]


def _local(targets: Tensor, first_row: int, rows: int) -> tuple[Tensor, Tensor]:
    """Index of each target among this rank's rows, and the positions whose target is here."""
    local = targets - first_row
    return local, ((local >= 0) & (local < rows)).nonzero()[:, 0]


class LogProbHead(ColumnParallelLinear):
    """The output layer, returning log-probabilities [E, 1] of the row's scored entries instead of logits.

    Put in place by changing the class of the built output layer, so that Megatron's flags for tied embeddings stay.
    `row` and `vocab` (the real vocabulary; padded rows take no part in the softmax) are set by the model.
    """

    row: RowOnDevice
    vocab: int

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        weight = self.weight if weight is None else weight
        assert self.row.predict_at is not None
        if self.sequence_parallel:
            # each rank's d_hidden is complete after the function's own all-reduce: do not sum it again
            input_ = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=False)
        hidden = input_[:, 0].index_select(0, self.row.predict_at)
        rows = len(weight)
        first_row = parallel_state.get_tensor_model_parallel_rank() * rows
        real = min(max(self.vocab - first_row, 0), rows)
        tensor_parallel = parallel_state.get_tensor_model_parallel_world_size() > 1
        group = parallel_state.get_tensor_model_parallel_group() if tensor_parallel else None
        return VocabParallelLogProb.apply(hidden, weight[:real], self.row.targets, first_row, group)[:, None], None
