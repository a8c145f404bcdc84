"""The one way rows go through the model: training, evaluation and the reference pass all come through here."""

from collections.abc import Callable, Sequence

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_spo.data.rows import PackedRow
from megatron_spo.model.attention import RowOnDevice, row_to_device
from megatron_spo.runtime.processes import Runtime

RowFunction = Callable[[PackedRow, Tensor], tuple[Tensor, Tensor]]
"""(row, response sums [pairs, 2]) -> (this row's share of the global objective, what to collect of the row)."""


def response_sums(row: PackedRow, logprobs: Tensor) -> Tensor:
    """fp32 [pairs, 2] sums of the scored tokens' log-probs [1, E]: chosen, rejected (0 where there is none)."""
    device = logprobs.device
    scored = logprobs[0].float().index_select(0, torch.from_numpy(row.score_index).to(device))
    lengths = torch.from_numpy(row.score_lengths).to(device)
    return torch.segment_reduce(scored, "sum", lengths=lengths, unsafe=True).view(-1, 2)


def run_rows(
    chunks: Sequence[torch.nn.Module],
    rows: Sequence[PackedRow],
    function: RowFunction,
    *,
    runtime: Runtime,
    backward: bool,
) -> list[Tensor]:
    """Send this rank's rows through the pipeline, one row per micro-batch.

    With `backward`, the gradients of the sum of all rows' objectives, over all data-parallel ranks, end up in the
    model's gradient buffers. Returns what `function` collected per row, on the last pipeline stage; [] elsewhere.
    """

    def forward_step(remaining: object, module: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], object]]:
        row = next(remaining)  # type: ignore[call-overload]
        on_device: RowOnDevice = row_to_device(row, runtime.device)

        def finish(logprobs: Tensor) -> tuple[Tensor, Tensor]:
            objective, collected = function(row, response_sums(row, logprobs))
            # Megatron divides by the micro-batches and its DDP by the data-parallel size: undo both, once, here
            return objective * (len(rows) * runtime.topology.data), collected

        return module(on_device), finish

    with torch.set_grad_enabled(backward):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(rows) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(rows),
            seq_length=len(rows[0].tokens),
            micro_batch_size=1,
            forward_only=not backward,
        )
