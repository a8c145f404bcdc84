"""Computes the model FLOPs utilisation (MFU) of a step: necessary operations divided by the peak of its GPUs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.schema import Config
from megatron_spo.planner.flops import forward_flops, step_flops
from megatron_spo.planner.gpus import GPUS
from megatron_spo.planner.rows import Lengths, RowSize

OTHER_KINDS = ("pcie", "nvl", "gb200")
"""Variants of the GPUs in the table with another speed."""


def peak_of(device: str, *, fp8: bool) -> float | None:
    """Returns the peak FLOP/s of a GPU by its driver name, or None if it is not in the table."""
    words = device.lower()
    if any(kind in words for kind in OTHER_KINDS):
        return None
    gpu = next((gpu for name, gpu in GPUS.items() if name in words), None)
    return None if gpu is None else gpu.fp8 if fp8 else gpu.bf16


class Utilisation:
    """Computes the seconds that batches would take on all GPUs at peak speed.

    Counts one forward and one backward pass over the tokens without padding. Recomputation, the second pass of
    lookahead and barrier, and the reference are not counted.
    """

    def __init__(self, config: Config, shape: ModelShape, sets: Mapping[str, Lengths], peak: float) -> None:
        """Args:
        config: the configuration.
        shape: the model.
        sets: lengths of the data sets by name.
        peak: FLOP/s of all GPUs together.
        """
        self._config, self._shape, self._sets, self._peak = config, shape, sets, peak

    def seconds(self, name: str, indices: NDArray[np.int64]) -> float:
        """Returns the seconds for the pairs `indices` of the data set `name`."""
        lengths = self._sets[name]
        tokens, entries, visible = (
            int(values[indices].sum()) for values in (lengths.tokens, lengths.entries, lengths.visible(self._shape))
        )
        row = RowSize(tokens, tokens, entries, visible, np.zeros((0, 2), dtype=np.int64))
        flops = step_flops(self._config, forward_flops(self._shape, row, necessary=True), necessary=True)
        return (self._shape.layers * (flops.linear + flops.attention) + flops.head) / self._peak
