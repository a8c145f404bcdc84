"""Log-probs and entropies of scored tokens from hidden states, without a [tokens, vocabulary] tensor.

The output layer is split over the tensor-parallel group by vocabulary. Logits exist for one chunk of positions at a
time; the backward pass recomputes them with the stored log-normaliser.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_spo.model.attention import RowOnDevice

LOGITS_PER_CHUNK = 2**25
"""Number of logits held at a time on one rank (128 MiB in fp32)."""
GPU_FACTOR = 2
"""Factor by which a GPU holds more logits, because small matrix products do not use it fully."""


@contextmanager
def _products_of(weight: Tensor) -> Iterator[None]:
    """Lets a CPU multiply fp32 copies of bf16 factors by its bf16 instructions, if it has them.

    The copies have no more digits and sums are in fp32, so only the order of the sums differs. It is twice as fast.
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 and later
    if settings is None or weight.is_cuda or weight.dtype != torch.bfloat16:
        yield
        return
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


KEPT: dict[str, Tensor] = {}
"""Memory of the last row on a CPU, for the next one."""


def _memory(name: str, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """Returns memory [*shape] on the device of `like`; on a CPU that of the last call with this name, if it suffices.

    The allocator of a CPU returns large blocks to the system, and getting new ones takes longer than filling them.
    """
    if like.is_cuda:
        return torch.empty(shape, dtype=dtype, device=like.device)
    size, kept = math.prod(shape), KEPT.get(name)
    if kept is None or len(kept) < size or kept.dtype != dtype:
        with torch.inference_mode(False):  # a forward pass without gradients may be the first call
            kept = KEPT[name] = torch.empty(size, dtype=dtype)
    return kept[:size].view(shape)


def _converted(matrix: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Returns a matrix in `dtype`, itself or a copy in the memory `name`."""
    return matrix if matrix.dtype == dtype else _memory(name, matrix, dtype, *matrix.shape).copy_(matrix)


def _factor(matrix: Tensor, name: str) -> Tensor:
    """Returns a factor for `_product`: on a CPU in fp32, as bf16 products with a result in fp32 need a GPU."""
    return matrix if matrix.is_cuda else _converted(matrix, torch.float32, name)


def _product(left: Tensor, right: Tensor, name: str) -> Tensor:
    """Returns the fp32 [n, m] product of two factors, [n, k] and [k, m]; on a CPU in the memory `name`."""
    if left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right, out=_memory(name, left, left.dtype, len(left), right.shape[1]))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds the product of two factors, [n, k] and [k, m], to `total`, fp32 [n, m]."""
    if left.dtype == torch.float32:
        torch.addmm(total, left, right, out=total)
    else:
        total += torch.mm(left, right, out_dtype=torch.float32)


class VocabParallelLogProb(torch.autograd.Function):
    """Computes log softmax(hidden @ weight^T)[target] and the entropy of that softmax, with the vocabulary split over a
    process group. The entropy has no gradient. With a `softcap` c, the logits x become c tanh(x / c)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        first_row: int,
        group: dist.ProcessGroup | None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns log-probs and entropies, fp32 [E] (nats), for hidden [E, h], weight [V_local, h] (vocabulary rows
        from `first_row` on) and targets [E]."""
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        normaliser, entropies = torch.empty_like(logprobs), torch.empty_like(logprobs)
        rows = _factor(weight, "rows")
        with _products_of(weight):
            for part in _chunks(hidden, weight):
                logits = _capped(_product(_factor(hidden[part], "states"), rows.t(), "logits"), softcap)
                peak = logits.amax(-1) if len(weight) else logits.new_full((len(logits),), -torch.inf)
                if group is not None:
                    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
                target_logit = torch.zeros_like(peak)
                if len(weight):
                    local, here = _local(targets[part], first_row, len(weight))
                    target_logit = torch.where(here, logits.gather(1, local)[:, 0], 0.0)
                logits.sub_(peak[:, None])
                shares = torch.exp(logits, out=_memory("shares", logits, logits.dtype, *logits.shape))
                sums = torch.stack([shares.sum(-1), target_logit, logits.mul_(shares).sum(-1)])
                if group is not None:
                    dist.all_reduce(sums, group=group)
                normaliser[part] = peak + sums[0].log()
                logprobs[part] = sums[1] - normaliser[part]
                entropies[part] = sums[0].log() - sums[2] / sums[0]
                del logits, shares  # before the logits of the next chunk exist
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        ctx.first_row, ctx.group, ctx.softcap = first_row, group, softcap
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = _sum_of_gradients(weight) if ctx.needs_input_grad[1] else None
        rows = _factor(weight, "rows")  # again: other rows, and other models, may have been computed since
        with _products_of(weight):
            for part in _chunks(hidden, weight):
                scale = gradients[0][part]
                states = _factor(hidden[part], "states")
                logits = _capped(_product(states, rows.t(), "logits"), ctx.softcap)
                slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square_()  # of c tanh(x / c)
                d_logits = logits.sub_(normaliser[part, None]).exp_().mul_(-scale[:, None])
                if len(weight):
                    local, here = _local(targets[part], ctx.first_row, len(weight))
                    d_logits.scatter_(1, local, d_logits.gather(1, local) + torch.where(here, scale, 0.0)[:, None])
                if slope is not None:
                    d_logits.mul_(slope)
                lowered = _converted(d_logits, weight.dtype, "lowered")
                d_hidden[part] = lowered @ weight
                if d_weight is not None:
                    _add_product(d_weight, _factor(lowered, "logits").t(), states)
                del logits, slope, d_logits, lowered  # before the logits of the next chunk exist
        if ctx.group is not None:
            dist.all_reduce(d_hidden, group=ctx.group)
        return d_hidden, None if d_weight is None else _gradient(d_weight, weight), None, None, None, None


def mark_added_on_cpu(weight: Any) -> None:
    """Declares that a hook adds each gradient of this weight, dense or sparse, to its `main_grad`."""
    weight.added_on_cpu = True


def adds_on_cpu(weight: Tensor) -> bool:
    return getattr(weight, "added_on_cpu", False)


def _sum_of_gradients(weight: Any) -> Tensor:
    """Returns where the fp32 gradients of the chunks are added: on a CPU, Megatron's buffer if possible, without memory
    for a gradient of this row; for an fp32 weight new memory, as it becomes the gradient itself."""
    if adds_on_cpu(weight):
        return weight.main_grad
    if weight.dtype == torch.float32:
        return torch.zeros_like(weight)
    return _memory("d_weight", weight, torch.float32, *weight.shape).zero_()


def _gradient(total: Tensor, weight: Tensor) -> Tensor:
    """Returns the gradient for autograd: without entries if it was added to Megatron's buffer."""
    if adds_on_cpu(weight):
        nowhere = torch.empty(1, 0, dtype=torch.long)
        return torch.sparse_coo_tensor(nowhere, weight.new_empty(0, *weight.shape[1:]), weight.shape)
    return total.to(weight.dtype)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    limit = LOGITS_PER_CHUNK * (GPU_FACTOR if hidden.is_cuda else 1)
    entries, size = len(hidden), max(16, limit // max(1, len(weight)))
    return [slice(i, min(i + size, entries)) for i in range(0, entries, size)]


def _local(targets: Tensor, first_row: int, rows: int) -> tuple[Tensor, Tensor]:
    """Returns the index [n, 1] of each target among this rank's rows (arbitrary if the row is on another rank), and
    whether the row is on this rank [n].

    It returns no list of the local targets, as the process would have to wait for the GPU to know its length.
    """
    local = targets - first_row
    return local.clamp(0, rows - 1)[:, None], (local >= 0) & (local < rows)


class LogProbHead(ColumnParallelLinear):
    """Output layer that returns log-prob and entropy [E, 2] of the row's scored entries instead of logits.

    It is installed by changing the class of the built output layer, which keeps Megatron's flags for tied embeddings.
    The model sets `row`, `vocab` (size without padding; padded rows are excluded from the softmax) and `softcap`.
    """

    row: RowOnDevice
    vocab: int
    softcap: float | None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        weight = self.weight if weight is None else weight
        assert self.row.predict_at is not None
        if self.sequence_parallel:
            # The function's own all-reduce makes each rank's d_hidden complete, so it must not be summed again.
            input_ = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=False)
        hidden = input_[:, 0].index_select(0, self.row.predict_at)
        rows = len(weight)
        first_row = parallel_state.get_tensor_model_parallel_rank() * rows
        real = min(max(self.vocab - first_row, 0), rows)
        tensor_parallel = parallel_state.get_tensor_model_parallel_world_size() > 1
        group = parallel_state.get_tensor_model_parallel_group() if tensor_parallel else None
        if real < rows:  # otherwise the slice's backward pass would copy the gradient
            weight = weight[:real]
        arguments = (hidden, weight, self.row.targets, first_row, group, self.softcap)
        return torch.stack(VocabParallelLogProb.apply(*arguments), dim=1), None
