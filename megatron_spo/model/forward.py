"""Runs rows through the model; training, evaluation and the reference pass all use this."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_spo.data.rows import PackedRow
from megatron_spo.model.attention import RowOnDevice, row_to_device
from megatron_spo.runtime.device import to_device
from megatron_spo.runtime.processes import Runtime

RowFunction = Callable[[PackedRow, Tensor], tuple[Tensor, Tensor]]
"""(row, response sums [pairs, 2, C]) -> (this row's share of the global objective, the values to collect for the row).

The C columns of the sums are the values that the model's head gives for each token: log-prob, entropy and, if
requested, the hidden state."""


def response_sums(row: PackedRow, entries: Tensor, measured: Tensor) -> Tensor:
    """Returns fp32 [pairs, 2, C] sums over the scored tokens of each response: chosen, rejected (0 if there is none).

    Under context parallelism the sums are those of all ranks, with this rank's gradient.

    Args:
        row: the whole row.
        entries: int64 [E], indices of the row's entries that were scored on this rank.
        measured: [C, E], the values of these entries.
    """
    device = measured.device
    every = torch.zeros(len(row.targets), len(measured), device=device).index_copy(0, entries, measured.t().float())
    scored = every.index_select(0, to_device(row.score_index, device))
    lengths = to_device(row.score_lengths, device)
    sums = torch.segment_reduce(scored, "sum", lengths=lengths, unsafe=True).view(-1, 2, len(measured))
    if parallel_state.get_context_parallel_world_size() == 1:
        return sums
    total = sums.detach().clone()
    dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
    return sums + (total - sums.detach())


def score_rows(
    chunks: Sequence[torch.nn.Module],
    rows: Sequence[PackedRow],
    *,
    runtime: Runtime,
    begun: Callable[[PackedRow], object] | None = None,
) -> list[Tensor]:
    """Returns the log-prob sums [pairs, 2] (nats) of each of this rank's rows on the last pipeline stage; []
    elsewhere. `begun` is called with each row when this rank begins with it."""

    def function(row: PackedRow, sums: Tensor) -> tuple[Tensor, Tensor]:
        return sums.sum(), sums[..., 0]

    return run_rows(chunks, rows, function, runtime=runtime, backward=False, begun=begun)


def run_rows(
    chunks: Sequence[torch.nn.Module],
    rows: Sequence[PackedRow],
    function: RowFunction,
    *,
    runtime: Runtime,
    backward: bool,
    begun: Callable[[PackedRow], object] | None = None,
) -> list[Tensor]:
    """Runs this rank's rows through the pipeline, one row per micro-batch.

    With `backward`, the gradient of the sum of all rows' objectives over all data-parallel ranks is accumulated in the
    model's gradient buffers. `begun` is called with each row when this rank begins with it.

    Returns:
        The values that `function` collected for each row on the last pipeline stage; [] elsewhere.
    """

    longest = max(len(row.tokens) for row in rows)

    def forward_step(remaining: object, module: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], object]]:
        row = next(remaining)  # type: ignore[call-overload]
        runtime.progress.tick()
        if begun is not None and module is chunks[0]:
            begun(row)
        on_device: RowOnDevice = row_to_device(
            row, runtime.device, rank=runtime.context_rank, ranks=runtime.topology.context, longest=longest
        )

        def finish(measured: Tensor) -> tuple[Tensor, Tensor]:
            assert on_device.entries is not None
            objective, collected = function(row, response_sums(row, on_device.entries, measured))
            # Megatron divides by the number of micro-batches and its DDP by the data-parallel size; this undoes both.
            # DDP also divides by the context-parallel size, for which Megatron compensates itself.
            return objective * (len(rows) * runtime.topology.data), collected

        return module(on_device), finish

    with runtime.clock.phase("forward_backward"), torch.set_grad_enabled(backward):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(rows) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(rows),
            seq_length=longest,
            micro_batch_size=1,
            forward_only=not backward,
        )
