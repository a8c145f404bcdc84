"""Log-probs of pairs under the reference, and how alike the hidden states of their two answers are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_spo.data.rows import PackedRow
from megatron_spo.model.forward import run_rows
from megatron_spo.runtime.device import to_device
from megatron_spo.runtime.processes import Runtime

COLUMNS = ("chosen", "rejected", "ches", "ches_per_token")
MEASURED = 2
"""Columns of the sums before those of the hidden states (model/forward.py)."""


def score_pairs(chunks: Sequence[torch.nn.Module], rows: Sequence[PackedRow], *, runtime: Runtime) -> list[Tensor]:
    """fp64 [pairs, 4] of each of this rank's rows, COLUMNS, on the last pipeline stage; [] elsewhere."""
    return run_rows(chunks, rows, _columns, runtime=runtime, backward=False, hidden_states=True)


def _columns(row: PackedRow, sums: Tensor) -> tuple[Tensor, Tensor]:
    """CHES (arXiv 2410.08847): <c, r> - |c|^2 of the summed final hidden states c, r that predict the tokens of the
    chosen and the rejected answer; per token the same of their means. NaN where there is no rejected answer."""
    lengths = to_device(row.score_lengths, sums.device).double().view(-1, 2)
    logprobs, hidden = sums[..., 0].double(), sums[..., MEASURED:].double()
    means = hidden / lengths[..., None]
    ches = [_ches(torch.where(lengths[..., None] > 0, one, torch.nan)) for one in (hidden, means)]
    return sums[..., 0].sum(), torch.cat([logprobs, torch.stack(ches, 1)], 1)


def _ches(answers: Tensor) -> Tensor:
    """Of [pairs, 2, h]."""
    chosen, rejected = answers.unbind(1)
    return (chosen * (rejected - chosen)).sum(-1)
