"""Writes Megatron's distributed format (torch_dist) file by file, without Megatron and without torch.distributed."""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
import xxhash
from torch.distributed.checkpoint.filesystem import _StorageInfo  # no public name, but torch's reader requires it
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_spo.checkpoint import folder as checkpoint_folder
from megatron_spo.checkpoint.lazy import Joined, Lazy
from megatron_spo.config.model_folder import CONFIG
from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.topology import padded_vocabulary
from megatron_spo.convert.formats.base import Record, Shard, filled
from megatron_spo.convert.source import Model
from megatron_spo.errors import UserError
from megatron_spo.model.families import Mapping, full_shape, mappings

CHUNK_BYTES = 2**26
"""Largest size of a box, a part of a tensor: torch.save holds a whole box in memory."""
FILE_BYTES = 2**30
"""Largest size of a torch_dist file: small enough to balance among processes, and to rewrite after a kill."""
_ENGINE_LINEAR = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
"""Layers for which Transformer Engine expects an `_extra_state` entry, which is empty unless fp8 is used."""


@dataclass(frozen=True)
class _Box:
    """Rows `start` to `stop` of a Megatron tensor, stored under `key` at the layer and expert indices `at`."""

    key: str
    at: tuple[int, ...]
    whole: Lazy
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.whole.row_bytes


class TorchDist:
    """A Megatron model folder: torch_dist files, config.json, tokenizer and a seal as in our checkpoints."""

    prefix = ""
    weights = ""
    """Subfolder of the torch_dist files within the model folder."""

    def vocabulary(self, shape: ModelShape) -> int:
        """Returns the number of rows of the embedding, padding included."""
        return padded_vocabulary(shape, 1)

    def shards(self, model: Model, limit: int) -> list[Shard]:
        boxes = [box for row in mappings(model.shape) for box in self._boxes(row, model)]
        _check_dtypes(boxes)
        groups = filled(((box, box.nbytes) for box in boxes), min(limit, FILE_BYTES))
        return [Shard(str(Path(self.weights, f"__{i}_0.distcp")), *group) for i, group in enumerate(groups)]

    def write(self, path: Path, items: list[_Box]) -> Record:
        entries = []
        with path.open("wb", buffering=0) as raw, _without_crc():
            out = _Summed(raw)
            for box in items:
                ones = (1,) * len(box.at)
                content = box.whole.rows(box.start, box.stop).view(*ones, box.stop - box.start, *box.whole.shape[1:])
                rest = [0] * (len(box.whole.shape) - 1)
                entries.append(_entry(out, content, box.key, [*box.at, box.start, *rest], list(content.shape)))
                if box.key.endswith(_ENGINE_LINEAR) and box.start == 0:
                    key = box.key.removesuffix("weight") + "_extra_state"
                    entries.append(_entry(out, [None], key, list(box.at), None))
        return {"sum": [out.tell(), out.digest.hexdigest()], "entries": entries}

    def finish(self, folder: Path, model: Model, records: dict[str, Record]) -> list[str]:
        weights = folder / self.weights
        self._write_index(weights, model, records)
        backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
        versions = {f"{name}_version": 1 for name in backends}
        (weights / "metadata.json").write_text(json.dumps(backends | versions))
        sums = {Path(name).name: record["sum"] for name, record in records.items()}
        notes, rows = [*model.notes, *self.finish_folder(folder, model, sums)], self.vocabulary(model.shape)
        if rows != model.shape.vocab:
            notes.append(f"padded the vocabulary from {model.shape.vocab} to {rows} rows; --to hf removes the padding")
        return notes

    def finish_folder(self, folder: Path, model: Model, sums: dict[str, list[int | str]]) -> list[str]:
        """Writes the files next to the torch_dist files, whose checksums are `sums`; returns messages for the user."""
        notes = model.sides.write(folder)
        (folder / CONFIG).write_text(model.config, encoding="utf-8")
        torch.save({}, folder / checkpoint_folder.COMMON)
        checkpoint_folder.seal(folder, {}, {"model": model.shape.family}, sums)
        return notes

    def _boxes(self, row: Mapping, model: Model) -> Iterator[_Box]:
        sources = [model.tensors[name] for name in row.sources]
        if len({source.dtype for source in sources}) > 1:
            raise _mixed(row.sources[0], sources[0], row.sources[-1], sources[-1])
        whole = Joined(sources, row.transform, full_shape(row, model.shape, self.vocabulary(model.shape)))
        height = max(1, CHUNK_BYTES // whole.row_bytes)
        for start in range(0, whole.shape[0], height):
            yield _Box(self.prefix + row.key, row.at, whole, start, min(start + height, whole.shape[0]))

    def _write_index(self, weights: Path, model: Model, records: dict[str, Record]) -> None:
        stacked: dict[str, tuple[int, ...]] = {}
        tensors: dict[str, TensorStorageMetadata] = {}
        for row in mappings(model.shape):
            key, whole = self.prefix + row.key, full_shape(row, model.shape, self.vocabulary(model.shape))
            stacked[key] = tuple(i + 1 for i in row.at)  # the last layer and expert set the final value
            properties = TensorProperties(model.tensors[row.sources[0]].dtype)
            tensors[key] = TensorStorageMetadata(properties, torch.Size(stacked[key] + whole), [])
        index = Metadata({**tensors}, storage_data={})
        for name, record in records.items():
            for key, offsets, sizes, begin, length in record["entries"]:
                where = _StorageInfo(Path(name).name, begin, length)
                if sizes is None:
                    of = stacked[key.removesuffix("_extra_state") + "weight"]
                    full = f"{key}/shard_{'.'.join(map(str, offsets))}_{'.'.join(map(str, of))}"
                    index.state_dict_metadata[full] = BytesStorageMetadata()
                    index.storage_data[MetadataIndex(full)] = where
                    continue
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                index.storage_data[MetadataIndex(key, chunk.offsets, len(tensors[key].chunks))] = where
                tensors[key].chunks.append(chunk)
        (weights / ".metadata").write_bytes(pickle.dumps(index))


@contextmanager
def _without_crc() -> Iterator[None]:
    """Disables CRC32 in torch.save: it takes longer than the writing itself, and torch.load ignores it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _entry(out: "_Summed", content: Any, key: str, offsets: list[int], sizes: list[int] | None) -> list[Any]:
    begin = out.tell()
    torch.save(content, cast(IO[bytes], out))
    return [key, offsets, sizes, begin, out.tell() - begin]


def _check_dtypes(boxes: list[_Box]) -> None:
    """Checks that all layers of a tensor have one dtype, because Megatron's format stacks them into one tensor."""
    first: dict[str, _Box] = {}
    for box in boxes:
        other = first.setdefault(box.key, box)
        if other.whole.dtype != box.whole.dtype:
            raise _mixed(f"{box.key} of layer {other.at}", other.whole, f"that of layer {box.at}", box.whole)


def _mixed(one: str, first: Lazy, other: str, second: Lazy) -> UserError:
    return UserError(
        f"{one} has dtype {first.dtype} and {other} has dtype {second.dtype}, but Megatron's format stores them as one "
        "tensor, and a conversion never casts; save the model in one dtype"
    )


class _Summed:
    """A file for torch.save that computes the checksum of everything written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._at = file, 0
        self.digest = xxhash.xxh3_128()

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        self.digest.update(view)
        self._at += (size := len(view))
        while view:
            view = view[self._file.write(view) :]
        return size

    def tell(self) -> int:
        """Returns the number of bytes written."""
        return self._at

    def flush(self) -> None:
        """Does nothing: writes are not buffered."""
