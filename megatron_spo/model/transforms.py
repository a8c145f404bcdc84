"""Pure transforms between one Megatron tensor and its Hugging Face tensors, in both directions.

A transform never holds a whole model: `read` takes the rows and columns that one rank needs from lazily opened sources;
`runs` gives the positions of each source's rows, for export.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Index = tuple[slice, ...]
Shape = tuple[int, ...]


class LazyTensor(Protocol):
    """A tensor on disk, as safetensors' `get_slice` returns it."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, index: Index) -> Tensor: ...


class Transform(Protocol):
    """How one global Megatron tensor is made of Hugging Face tensors."""

    def shapes(self, full: Shape) -> list[Shape]:
        """Returns the shapes of the Hugging Face tensors of a Megatron tensor of shape `full`."""

    def read(self, sources: Sequence[LazyTensor], index: Index) -> Tensor:
        """Reads the part `index` of the Megatron tensor."""

    def runs(self, source: int, full: Shape) -> list[slice]:
        """Returns the slices of a Megatron tensor of shape `full` with the rows of one Hugging Face tensor, in
        order."""


@dataclass(frozen=True)
class Copy:
    """The same tensor on both sides."""

    def shapes(self, full: Shape) -> list[Shape]:
        return [full]

    def read(self, sources: Sequence[LazyTensor], index: Index) -> Tensor:
        return sources[0][index]

    def runs(self, source: int, full: Shape) -> list[slice]:
        return [slice(0, full[0])]


@dataclass(frozen=True)
class Concatenate:
    """Sources with equally many rows, concatenated (gate, then up in SwiGLU's linear_fc1)."""

    parts: int

    def shapes(self, full: Shape) -> list[Shape]:
        return [(full[0] // self.parts, *full[1:])] * self.parts

    def read(self, sources: Sequence[LazyTensor], index: Index) -> Tensor:
        height = sources[0].get_shape()[0]
        rows, rest = index[0], index[1:]
        pieces = []
        for i, source in enumerate(sources):
            start, stop = max(rows.start, i * height), min(rows.stop, (i + 1) * height)
            if start < stop:
                pieces.append(source[(slice(start - i * height, stop - i * height), *rest)])
        return torch.cat(pieces)

    def runs(self, source: int, full: Shape) -> list[slice]:
        height = full[0] // self.parts
        return [slice(source * height, (source + 1) * height)]


@dataclass(frozen=True)
class GroupedQKV:
    """Query, key and value interleaved by query group: [q of group 0 | k | v | q of group 1 | ...]."""

    heads: int
    groups: int
    head_dim: int

    @property
    def _widths(self) -> list[int]:
        """Rows of q, k and v in one group."""
        return [self.heads // self.groups * self.head_dim, self.head_dim, self.head_dim]

    def shapes(self, full: Shape) -> list[Shape]:
        return [(self.groups * width, *full[1:]) for width in self._widths]

    def read(self, sources: Sequence[LazyTensor], index: Index) -> Tensor:
        rows, rest = index[0], index[1:]
        height = sum(self._widths)
        assert rows.start % height == 0 and rows.stop % height == 0, "tensor parallelism cuts between query groups"
        first, last = rows.start // height, rows.stop // height
        parts = []
        for source, width in zip(sources, self._widths, strict=True):
            part = source[(slice(first * width, last * width), *rest)]
            parts.append(part.reshape(last - first, width, *part.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def runs(self, source: int, full: Shape) -> list[slice]:
        height, width, above = sum(self._widths), self._widths[source], sum(self._widths[:source])
        return [slice(start, start + width) for start in range(above, self.groups * height, height)]


@dataclass(frozen=True)
class PaddedVocabulary:
    """Vocabulary rows; Megatron's tensor has rows of zeros after them, so that every rank holds equally many."""

    vocab: int

    def shapes(self, full: Shape) -> list[Shape]:
        return [(self.vocab, *full[1:])]

    def read(self, sources: Sequence[LazyTensor], index: Index) -> Tensor:
        rows, rest = index[0], index[1:]
        real = sources[0][(slice(min(rows.start, self.vocab), min(rows.stop, self.vocab)), *rest)]
        padded = real.new_zeros(rows.stop - rows.start, *real.shape[1:])
        padded[: real.shape[0]] = real
        return padded

    def runs(self, source: int, full: Shape) -> list[slice]:
        return [slice(0, self.vocab)]
