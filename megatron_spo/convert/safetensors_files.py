"""Safetensors files, read and written without ever holding (or mapping) more than a few rows."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from megatron_spo.convert.lazy import InFile, Lazy, as_bytes
from megatron_spo.errors import UserError
from megatron_spo.model.hf_files import shard_files

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the format's own bound


def read_tensors(folder: Path) -> dict[str, Lazy]:
    """The tensors of a model folder, by name.

    Raises:
        UserError: a file is damaged, or holds a kind of numbers that is not built.
    """
    return {name: tensor for path in shard_files(folder) for name, tensor in _in_file(path)}


def _in_file(path: Path) -> Iterator[tuple[str, Lazy]]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _MAX_HEADER)))
        header.pop("__metadata__", None)
        entries = [(name, _checked(entry)) for name, entry in header.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy or download it again") from None
    size = 8 + length + max((entry["data_offsets"][1] for _, entry in entries), default=0)
    if path.stat().st_size != size:
        raise UserError(f"{path} has {path.stat().st_size} bytes instead of {size}; copy or download it again")
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise UserError(
                f"{path}: {name} is in {entry['dtype']}, which is not built; built are {', '.join(_DTYPES)}"
            )
        offset = 8 + length + entry["data_offsets"][0]
        yield name, InFile(path, offset, tuple(entry["shape"]), _DTYPES[entry["dtype"]])


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    start, stop = entry["data_offsets"]
    if not 0 <= start <= stop or not all(isinstance(size, int) and size > 0 for size in entry["shape"]):
        raise ValueError(f"its header has {entry}")
    return entry


def write_tensors(path: Path, tensors: Mapping[str, Lazy]) -> list[int | str]:
    """Write a file that holds these tensors; returns its size and xxh3_128.

    Tensors of wider numbers come first, so that every one is aligned.
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
