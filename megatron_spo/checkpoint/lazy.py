"""Tensors on disk whose rows can be read without the rest, independent of how they are stored."""

import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_spo.errors import UserError
from megatron_spo.model.transforms import PaddedVocabulary, Shape, Transform

BLOCK_BYTES = 2**25
"""Bytes of a tensor that are in memory at a time, unless one row is larger."""


class Lazy(ABC):
    """A tensor of at least one dimension that is read by rows (indices of the first dimension).

    Attributes:
        shape, dtype: as for a torch tensor.
    """

    shape: Shape
    dtype: torch.dtype

    @abstractmethod
    def fill(self, start: int, out: Tensor) -> None:
        """Reads rows from `start` on into the contiguous tensor `out` [rows, *shape[1:]].

        Raises:
            UserError: the file is truncated.
        """

    @property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.shape[0] * self.row_bytes

    def rows(self, start: int, stop: int) -> Tensor:
        """Reads the rows from `start` to `stop` (exclusive)."""
        out = empty((stop - start, *self.shape[1:]), self.dtype)
        self.fill(start, out)
        return out

    def blocks(self) -> Iterator[Tensor]:
        """Yields the whole tensor in blocks of rows; each block overwrites the previous one."""
        height = min(self.shape[0], max(1, BLOCK_BYTES // max(1, self.row_bytes)))
        memory = empty((height, *self.shape[1:]), self.dtype)
        for start in range(0, self.shape[0], height):
            block = memory[: min(height, self.shape[0] - start)]
            self.fill(start, block)
            yield block


@dataclass(frozen=True)
class InFile(Lazy):
    """A tensor stored contiguously in a file from byte `offset` on."""

    path: Path
    offset: int
    shape: Shape
    dtype: torch.dtype

    def fill(self, start: int, out: Tensor) -> None:
        into, at = as_bytes(out), self.offset + start * self.row_bytes
        with self.path.open("rb", buffering=0) as file:
            while into:
                count = os.preadv(file.fileno(), [into], at)
                if count == 0:
                    raise UserError(f"{self.path} is truncated; copy or download it again")
                into, at = into[count:], at + count


@dataclass(frozen=True)
class Picked(Lazy):
    """Slices of another tensor's rows, concatenated."""

    whole: Lazy
    runs: Sequence[slice]

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return (sum(run.stop - run.start for run in self.runs), *self.whole.shape[1:])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.whole.dtype

    def fill(self, start: int, out: Tensor) -> None:
        done = 0
        for run in self.runs:
            height = run.stop - run.start
            first, last = max(done, start), min(done + height, start + len(out))
            if first < last:
                self.whole.fill(run.start + first - done, out[first - start : last - start])
            done += height


@dataclass(frozen=True)
class Joined(Lazy):
    """A Megatron tensor of shape `shape`, assembled from its Hugging Face tensors."""

    sources: Sequence[Lazy]
    transform: Transform
    shape: Shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.sources[0].dtype

    def fill(self, start: int, out: Tensor) -> None:
        if isinstance(self.transform, PaddedVocabulary):
            out[max(0, self.transform.vocab - start) :] = 0
        for i, source in enumerate(self.sources):
            done = 0
            for run in self.transform.runs(i, self.shape):
                first, last = max(run.start, start), min(run.stop, start + len(out))
                if first < last:
                    source.fill(done + first - run.start, out[first - start : last - start])
                done += run.stop - run.start


def empty(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Returns an empty tensor in its own memory mapping, which is returned to the system with the tensor.

    malloc may keep blocks of up to 32 MiB in its heap, where torch's aligned memory does not fit into the hole left by
    a block of the same size. The memory of a conversion would then grow with the number of tensors.
    """
    size = prod(shape) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)[:size].view(dtype).view(shape)


def as_bytes(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor as bytes."""
    return tensor.view(-1).view(torch.uint8).numpy().data
