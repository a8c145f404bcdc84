"""Parts of the tensors of a checkpoint, read without the rest of it."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_spo.errors import UserError


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor, at the places that the plan gives."""

    def __init__(self, part: Tensor) -> None:
        super().__init__()
        self._part = part

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        places = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._part[tuple(slice(start, start + length) for start, length in places)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        return None


class StoredTensors:
    """The tensors of a checkpoint folder in torch's distributed format, by Megatron's keys."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._reader = folder, dcp.FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        every = metadata.state_dict_metadata.items()
        self._tensors = {key: entry for key, entry in every if isinstance(entry, TensorStorageMetadata)}

    def keys(self) -> set[str]:
        """Of all tensors."""
        return set(self._tensors)

    def dtype(self, key: str) -> torch.dtype:
        """Of one tensor."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, layer: int | None) -> Tensor:
        """A whole tensor, or the part of it that has this index on the first axis.

        Raises:
            UserError: the checkpoint holds only some of it.
        """
        stored = self._tensors[key]
        size = list(stored.size) if layer is None else [1, *stored.size[1:]]
        part = torch.empty(size, dtype=stored.properties.dtype)
        start = torch.Size([layer or 0] + [0] * (len(size) - 1))
        items = create_read_items_for_chunk_list(key, stored, [ChunkStorageMetadata(start, part.shape)])
        if sum(item.lengths.numel() for item in items) != part.numel():
            raise UserError(f"{self._folder} holds {key} only in part; it is damaged: use another checkpoint")
        self._reader.read_data(LoadPlan(items), _Into(part)).wait()
        return part if layer is None else part[0]
