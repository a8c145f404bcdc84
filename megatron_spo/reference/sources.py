"""Sources of the reference's log-probs in training: the cache, or the policy with its adapters switched off."""

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
from megatron_spo.runtime.device import to_device
from megatron_spo.runtime.processes import Runtime


class ReferenceSums(Protocol):
    """Gives the reference's summed log-probs of the responses of a data set's rows."""

    def prepare(self, rows: Sequence[PackedRow]) -> None:
        """Prepares this rank's rows of a global batch; all ranks must call it together, before any pass over them."""

    def of(self, row: PackedRow) -> Tensor:
        """Returns a prepared row's sums, fp32 [pairs, 2]: chosen, rejected (nats). Only on the last pipeline stage."""


class CachedSums:
    """Reads the sums from the reference cache."""

    def __init__(self, store: ReferenceStore, device: torch.device) -> None:
        self._store, self._device = store, device

    def prepare(self, rows: Sequence[PackedRow]) -> None:
        """Does nothing, as the cache is memory-mapped."""

    def of(self, row: PackedRow) -> Tensor:
        """Returns the sums of the row's pairs."""
        return to_device(np.stack(self._store.get(row.pairs), axis=1), self._device)


class AdaptersOff:
    """Measures the sums by a forward pass with the adapters off, which adds about a third of a step's time."""

    def __init__(self, trainable: Trainable, runtime: Runtime) -> None:
        self._trainable, self._runtime = trainable, runtime
        self._sums: dict[int, Tensor] = {}

    def prepare(self, rows: Sequence[PackedRow]) -> None:
        """Runs a forward pass over the rows; drops the sums of earlier rows."""
        with adapters_off(self._trainable.chunks):
            sums = score_rows(self._trainable.wrapped, rows, runtime=self._runtime)
        self._sums = {id(row): one for row, one in zip(rows, sums, strict=False)}  # no sums on the other stages

    def of(self, row: PackedRow) -> Tensor:
        """Returns the sums that `prepare` measured for this row."""
        return self._sums[id(row)]
