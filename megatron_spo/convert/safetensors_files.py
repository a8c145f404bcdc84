"""Reads and writes safetensors files without holding (or mapping) more than a few rows at a time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from megatron_spo.checkpoint.lazy import InFile, Lazy, as_bytes
from megatron_spo.config.model_folder import StoredTensor
from megatron_spo.model.hf_files import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def lazy(stored: Mapping[str, StoredTensor]) -> dict[str, Lazy]:
    """Returns the tensors of a model folder as lazy tensors, which are read row by row."""
    return {name: InFile(one.file, one.start, one.shape, DTYPES[one.dtype]) for name, one in stored.items()}


def write_tensors(path: Path, tensors: Mapping[str, Lazy]) -> list[int | str]:
    """Writes tensors to a file; returns its size in bytes and its xxh3_128 checksum.

    Tensors with wider dtypes come first, so that every tensor is aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    with path.open("wb", buffering=0) as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for _, tensor in ordered:
            for block in tensor.blocks():
                content = as_bytes(block)
                digest.update(content)
                while content:
                    content = content[file.write(content) :]
    return [8 + len(text) + end, digest.hexdigest()]
