"""Hugging Face model folders: finding them, reading slices of their tensors, and fingerprinting them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_spo.config.model_folder import (
    FLOATS,
    StoredTensor,
    check_numbers,
    check_tied,
    read_generation_config,
    stored_tensors,
)
from megatron_spo.config.model_shape import ModelShape
from megatron_spo.data import hub
from megatron_spo.errors import UserError
from megatron_spo.model.families import full_shape, left_out, mappings
from megatron_spo.model.transforms import LazyTensor

SHARD_BYTES = 5 * 2**30
DTYPES = dict(zip(FLOATS, (torch.float64, torch.float32, torch.float16, torch.bfloat16), strict=True))


def locate_model(path: str, key: str = "model.path") -> Path:
    """Returns the folder of a model: `path` itself, or the local copy of a hub id, which is downloaded if not cached.

    Raises:
        UserError: `path` is neither a folder nor a hub id that can be downloaded.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    return hub.download(path, key)


def model_tensors(folder: Path, shape: ModelShape) -> tuple[dict[str, StoredTensor], list[str]]:
    """Returns the tensors of a model folder in the model's order, and the names of those that it does not need.

    Raises:
        UserError: a file is damaged, or a tensor is missing, belongs to no part of the model, or has another shape or
            dtype than config.json requires.
    """
    every = stored_tensors(folder)
    needless = left_out(every, shape, folder)
    tensors = {}
    for row in mappings(shape):
        expected = row.transform.shapes(full_shape(row, shape, shape.vocab))
        for name, size in zip(row.sources, expected, strict=True):
            if name not in every:
                raise UserError(f"{folder} lacks the tensor {name}, which its config.json requires")
            found = every[name]
            if found.shape != size:
                raise UserError(f"{folder}: {name} has shape {found.shape}, but its config.json requires {size}")
            check_numbers(name, found)
            tensors[name] = found
    return tensors, needless


def check_weights(folder: Path, shape: ModelShape) -> None:
    """Checks that a folder holds this model and that transformers would load the same weights.

    Raises:
        UserError: as `model_tensors`, or the output layer contradicts config.json.
    """
    model_tensors(folder, shape)
    check_tied(folder, shape.raw, stored_tensors(folder))
    read_generation_config(folder)


class HFWeights:
    """The tensors of a model folder, opened lazily: only the requested slices are read.

    Raises:
        UserError: as `model_tensors`.
    """

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        self._handles: dict[Path, Any] = {}
        self._where, _ = model_tensors(folder, shape)
        for path in {tensor.file for tensor in self._where.values()}:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged ({error}); copy or download it again") from error

    def __enter__(self) -> "HFWeights":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._handles.clear()

    def slice(self, name: str) -> LazyTensor:
        """Returns one tensor without reading it."""
        return self._handles[self._where[name].file].get_slice(name)


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(raw: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """Returns the digest of a model, from its config.json and the digests of its safetensors files by name."""
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode())
    for name, content in sorted(digests.items()):
        digest.update(f"{name} {content}".encode())
    return digest.hexdigest()
