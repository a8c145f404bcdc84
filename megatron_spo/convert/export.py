"""From a training checkpoint, written in any layout, to a Hugging Face model folder; no processes and no GPU needed."""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_spo.config.model_shape import ModelShape, read_model_shape
from megatron_spo.errors import UserError
from megatron_spo.model.checkpoint_files import Checkpoint, Damaged, locate, open_checkpoint
from megatron_spo.model.families import Mapping, mappings
from megatron_spo.model.hf_files import copy_side_files, locate_model, write_shards


def to_hf(source: Path, target: Path) -> None:
    """Write the model of a run directory (its latest checkpoint) or of one checkpoint as a Hugging Face folder.

    Config, tokenizer and generation config come from the model the run started from. The folder appears under its
    name when it is complete.

    Raises:
        UserError: no checkpoint there, it lacks a tensor, or `target` exists and is not empty.
    """
    found = _open(locate(source))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder; choose another name or remove it")
    model = found.record["config"]["model"]
    origin = locate_model(model["path"])
    shape = read_model_shape(origin)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_side_files(origin, partial)
    if model["tokenizer"]:
        copy_side_files(locate_model(model["tokenizer"]), partial)
    dtype = _write_weights(dcp.FileSystemReader(found.path), shape, partial, found.path)
    written = {**shape.raw, "dtype": str(dtype).removeprefix("torch.")}
    written.pop("torch_dtype", None)
    (partial / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    if target.exists():
        target.rmdir()
    partial.rename(target)


def _open(folder: Path) -> Checkpoint:
    try:
        return open_checkpoint(folder)
    except Damaged as error:
        raise UserError(f"{error}; name another checkpoint") from error


def _write_weights(reader: dcp.FileSystemReader, shape: ModelShape, folder: Path, checkpoint: Path) -> torch.dtype:
    stored = reader.read_metadata().state_dict_metadata
    rows = mappings(shape)
    absent = sorted({row.key for row in rows} - set(stored))
    if absent:
        raise UserError(f"{checkpoint} lacks {absent[0]}, which the run's model has; it is damaged or of another model")
    write_shards(folder, _tensors(reader, stored, rows))
    first = stored[rows[0].key]
    assert isinstance(first, TensorStorageMetadata)
    return first.properties.dtype


def _tensors(reader: dcp.FileSystemReader, stored: dict[str, Any], rows: list[Mapping]) -> Iterator[tuple[str, Tensor]]:
    """Every Hugging Face tensor; one Megatron tensor, all its layers stacked, is in memory at a time."""
    for key in dict.fromkeys(row.key for row in rows):
        metadata: TensorStorageMetadata = stored[key]
        whole = {key: torch.empty(metadata.size, dtype=metadata.properties.dtype)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
            dcp.load(whole, storage_reader=reader, no_dist=True)
        for row in rows:
            if row.key == key:
                full = whole[key] if row.layer is None else whole[key][row.layer]
                for name, tensor in zip(row.sources, row.transform.split(full), strict=True):
                    yield name, tensor.clone()
