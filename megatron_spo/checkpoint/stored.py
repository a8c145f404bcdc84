"""Reads single tensors, or parts of them, from a folder in torch's distributed format (torch_dist)."""

import io
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode  # torch's notes on serialization name it; 2.8 to 2.13
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_spo.checkpoint.folder import Damaged, read_index
from megatron_spo.checkpoint.lazy import InFile, Lazy
from megatron_spo.errors import UserError
from megatron_spo.model.transforms import Shape


class StoredTensors:
    """The tensors of a folder, by Megatron's keys without their common prefix, if there is one.

    Raises:
        UserError: the index cannot be read.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self._prefix = folder, prefix
        try:
            index = read_index(folder)
        except Damaged as error:
            raise UserError(f"{error}; use another checkpoint") from error
        self._storage = index.storage_data
        every = index.state_dict_metadata.items()
        self._tensors = {
            k.removeprefix(prefix): entry for k, entry in every if isinstance(entry, TensorStorageMetadata)
        }
        self.chunks = cache(self._chunks)
        self.content = cache(self._content)

    def keys(self) -> set[str]:
        """Returns the keys of all tensors."""
        return set(self._tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def dtype(self, key: str) -> torch.dtype:
        """Returns the dtype of one tensor."""
        return self._tensors[key].properties.dtype

    def size(self, key: str) -> Shape:
        """Returns the shape of one tensor."""
        return tuple(self._tensors[key].size)

    def part(self, key: str, at: tuple[int, ...] = ()) -> Lazy:
        """Returns a tensor lazily, or the part of it at the indices `at` of its first axes."""
        return _Part(self, key, at, self.size(key)[len(at) :], self.dtype(key))

    def read(self, key: str, layer: int | None) -> Tensor:
        """Reads a whole tensor, or the part of it at index `layer` of the first axis.

        Raises:
            UserError: the folder holds only part of it.
        """
        part = self.part(key, () if layer is None else (layer,))
        return part.rows(0, part.shape[0])

    def _chunks(self, key: str, leading: int) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
        """Returns the stored chunks of a tensor, by the indices of the first `leading` axes that they cover."""
        found: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
        for chunk in self._tensors[key].chunks:
            spans = zip(chunk.offsets[:leading], chunk.sizes[:leading], strict=True)
            for at in product(*(range(start, start + size) for start, size in spans)):
                found.setdefault(at, []).append(chunk)
        return found

    def _content(self, key: str, offsets: torch.Size) -> InFile:
        """Returns where the data of a chunk is; torch.save has written it into a zip archive within the file."""
        where = self._storage[MetadataIndex(self._prefix + key, offsets)]
        path = self.folder / where.relative_path
        with _Window(path, where.offset, where.length) as window, FakeTensorMode():
            tensor = torch.load(cast(IO[bytes], window), weights_only=True)
        if not tensor.is_contiguous():
            raise UserError(f"{path}: {key} is not stored contiguously, which is not supported; save it contiguous")
        # torch 2.13 documents this attribute under "Utilities" of its notes on serialization
        offset = where.offset + tensor.untyped_storage()._checkpoint_offset
        return InFile(path, offset + tensor.storage_offset() * tensor.itemsize, tuple(tensor.shape), tensor.dtype)


@dataclass(frozen=True)
class _Part(Lazy):
    """The part of a stored tensor at the indices `at` of its first axes."""

    stored: StoredTensors
    key: str
    at: tuple[int, ...]
    shape: Shape
    dtype: torch.dtype

    def fill(self, start: int, out: Tensor) -> None:
        leading, filled = len(self.at), 0
        for chunk in self.stored.chunks(self.key, leading).get(self.at, ()):
            height = chunk.sizes[leading]
            first = max(chunk.offsets[leading], start)
            last = min(chunk.offsets[leading] + height, start + len(out))
            if first >= last:
                continue
            target = out[first - start : last - start]
            for axis in range(1, target.dim()):
                target = target.narrow(axis, chunk.offsets[leading + axis], chunk.sizes[leading + axis])
            before = 0
            for axis, index in enumerate(self.at):
                before = before * chunk.sizes[axis] + index - chunk.offsets[axis]
            self._copy(chunk, before * height + first - chunk.offsets[leading], target)
            filled += target.numel()
        if filled != out.numel():
            raise UserError(f"{self.stored.folder} is damaged: it has only part of {self.key}; use another checkpoint")

    def _copy(self, chunk: ChunkStorageMetadata, start: int, target: Tensor) -> None:
        """Reads rows of a chunk into `target`; all its axes before the last `target.dim() - 1` together form the
        rows."""
        box = self.stored.content(self.key, chunk.offsets)
        width = tuple(target.shape[1:])
        rows = InFile(box.path, box.offset, (prod(box.shape) // prod(width), *width), box.dtype)
        if target.is_contiguous():
            rows.fill(start, target)
        else:
            target.copy_(rows.rows(start, start + len(target)))


class _Window(io.RawIOBase):
    """A part of a file as a file object."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._file, self._start, self._length = path.open("rb"), start, length
        self._file.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length}[whence]
        return self._file.seek(self._start + base + offset) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        return self._file.readinto(view[: max(0, min(len(view), self._length - self.tell()))])

    def close(self) -> None:
        self._file.close()
        super().close()
