"""Where the reference's log-probs of the rows at hand come from: its cache, or the policy with its adapters off."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_spo.data.rows import PackedRow
from megatron_spo.model.forward import score_rows
from megatron_spo.model.lora import adapters_off
from megatron_spo.model.optimizer import Trainable
from megatron_spo.reference.cache import ReferenceStore
from megatron_spo.runtime.processes import Runtime


class ReferenceSums(Protocol):
    """The reference's response sums of a data set's rows."""

    def prepare(self, rows: Sequence[PackedRow]) -> None:
        """Get ready for this rank's rows of a global batch; all ranks call it together, before any pass over them."""

    def of(self, row: PackedRow) -> Tensor:
        """fp32 [pairs, 2] sums of a row that was prepared: chosen, rejected. On the last pipeline stage."""


class CachedSums:
    """Read from the reference cache."""

    def __init__(self, store: ReferenceStore, device: torch.device) -> None:
        self._store, self._device = store, device

    def prepare(self, rows: Sequence[PackedRow]) -> None:
        """Nothing: the cache is memory-mapped."""

    def of(self, row: PackedRow) -> Tensor:
        """Sums by the data set indices of the row's pairs."""
        return torch.from_numpy(np.stack(self._store.get(row.pairs), axis=1)).to(self._device)


class AdaptersOff:
    """Measured by a forward pass over the same rows with the adapters switched off: about a third of a step more."""

    def __init__(self, trainable: Trainable, runtime: Runtime) -> None:
        self._trainable, self._runtime = trainable, runtime
        self._sums: dict[int, Tensor] = {}

    def prepare(self, rows: Sequence[PackedRow]) -> None:
        """One forward pass over the rows; the sums of earlier rows are dropped."""
        with adapters_off(self._trainable.chunks):
            sums = score_rows(self._trainable.wrapped, rows, runtime=self._runtime)
        self._sums = {id(row): one for row, one in zip(rows, sums, strict=False)}  # no sums on the other stages

    def of(self, row: PackedRow) -> Tensor:
        """What `prepare` found for this very row."""
        return self._sums[id(row)]
