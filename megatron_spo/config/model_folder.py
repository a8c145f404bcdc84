"""Reads Hugging Face model folders: which files contain the weights, and where each tensor is stored.

A folder is read as transformers reads it. It is rejected, with a message that names the file and the remedy, if
transformers would fail or if two programs would read different weights from it. Weights are not loaded: only the
headers of the safetensors files are read, and head and embedding are compared if `tie_word_embeddings` is true.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_spo.errors import UserError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
GEMMA = ("gemma2", "gemma3_text")
"""Families with tied embeddings by default."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Supported data types of weights, by safetensors' names."""
_MAX_HEADER = 100_000_000  # bytes; limit of the safetensors format
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
         "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64, "F4": 4}  # fmt: skip
_BLOCK = 2**24


@dataclass(frozen=True)
class StoredTensor:
    """A tensor stored in bytes `start` to `stop` of a file; `dtype` is safetensors' name, such as "BF16"."""

    file: Path
    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that must contain an object.

    Raises:
        UserError: the file cannot be read, is not JSON, or is not an object.
        FileNotFoundError: the file does not exist.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); copy or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json of a model folder.

    Raises:
        UserError: the folder or the file is missing, the file is damaged or has no model type, or it names other
            weight files than the usual ones.
    """
    path = folder / CONFIG
    try:
        raw = read_json_object(path)
    except FileNotFoundError:
        if not folder.is_dir():
            raise UserError(f"model folder {folder} does not exist") from None
        is_run = (folder / "checkpoints").is_dir()
        hint = f"; convert it first: megatron-spo convert {folder} DST --to hf" if is_run else ""
        raise UserError(f"{path}: file does not exist; {folder} is not a Hugging Face model folder{hint}") from None
    if not isinstance(raw.get("model_type"), str):
        raise UserError(
            f"{path}: model_type = {raw.get('model_type')!r}; must be the name of a model family, such as 'llama'"
        )
    if raw.get("transformers_weights") is not None:
        raise UserError(f"{path}: transformers_weights = {raw['transformers_weights']!r} is not supported; rename "
                        f"the file to {WEIGHTS} or list it in {INDEX}, and remove the key")  # fmt: skip
    if not isinstance(raw.get("tie_word_embeddings", False), bool | None):
        raise UserError(f"{path}: tie_word_embeddings = {raw['tie_word_embeddings']!r}; must be true or false")
    for key in ("dtype", "torch_dtype"):
        if not isinstance(raw.get(key), str | None):
            raise UserError(f"{path}: {key} = {raw[key]!r}; must be the name of a data type, such as 'bfloat16'")
    return raw


def is_tied(raw: Mapping[str, Any]) -> bool:
    """Returns whether the head of a model with this config.json is tied to its embedding."""
    return bool(raw.get("tie_word_embeddings", raw["model_type"] in GEMMA))


def check_folder(folder: Path) -> None:
    """Checks a model folder of any family as far as possible without loading the weights.

    Raises:
        UserError: config.json, generation_config.json, or a weight file is missing or invalid.
    """
    raw = read_config(folder)
    read_generation_config(folder)
    tensors = stored_tensors(folder)
    layers = raw.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(tensors):  # building so many layers could take forever
        raise UserError(f"{folder / CONFIG}: num_hidden_layers = {layers}, but the weights have only {len(tensors)} "
                        "tensors; use config.json and weights of the same model")  # fmt: skip
    check_tied(folder, raw, tensors)
    if not raw.get("quantization_config"):
        for name, tensor in tensors.items():
            if name.endswith(".weight"):
                check_numbers(name, tensor)


def count_numbers(folder: Path, *, tied: bool) -> int:
    """Returns the number of parameters stored in a folder, without tensors that a model computes from others.

    Raises:
        UserError: see `stored_tensors`.
    """
    tensors = stored_tensors(folder).items()
    return sum(prod(tensor.shape) for name, tensor in tensors if not is_needless(name, tied=tied))


def check_numbers(name: str, tensor: StoredTensor) -> None:
    """Checks that a tensor has floating-point numbers of at least 16 bits.

    Raises:
        UserError: it has another data type.
    """
    if tensor.dtype not in FLOATS:
        raise UserError(f"{tensor.file}: {name} has data type {tensor.dtype}, which is not supported; supported: "
                        f"{', '.join(FLOATS)}")  # fmt: skip


def read_generation_config(folder: Path) -> dict[str, Any] | None:
    """Reads generation_config.json; returns None if it does not exist.

    Raises:
        UserError: the file is damaged, or eos_token_id is neither a token id nor a list of token ids.
    """
    path = folder / GENERATION_CONFIG
    try:
        content = read_json_object(path)
    except FileNotFoundError:
        return None
    token_ids(content.get("eos_token_id"), f"{path}: eos_token_id")
    return content


def token_ids(value: Any, what: str) -> list[int]:
    """Returns the token ids of an `eos_token_id`, which may be None, one id, or a list.

    Raises:
        UserError: the value is something else; `what` names it in the message.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        raise UserError(f"{what} = {value!r}; must be a token id or a list of token ids")
    return list(ids)


def has_weights(folder: Path) -> bool:
    """Returns whether a folder contains weights or an index of weights."""
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that determine the weights of a model folder, in a fixed order."""
    return [*sorted(folder.glob("*.distcp")), folder / METADATA] if is_megatron(folder) else shard_files(folder)


def shard_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a model folder, sorted.

    Raises:
        UserError: there are none, the index is invalid or names missing files, or there are two sets of weights.
    """
    whole, index = folder / WEIGHTS, folder / INDEX
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        if whole.exists() and names != [WEIGHTS]:
            raise UserError(
                f"{folder} contains two sets of weights: {WEIGHTS}, which transformers would read, and the files in "
                f"{INDEX} ({names[0]}, ...), which other programs read; remove the set that is not the model"
            )
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise UserError(f"{index} names {absent[0]}, which does not exist; copy the whole model folder")
        return [folder / name for name in names]
    if whole.exists():
        return [whole]
    if is_megatron(folder):
        raise UserError(f"{folder} is a Megatron model folder, but this needs a Hugging Face model folder; convert it: "
                        f"megatron-spo convert {folder} DST --to hf")  # fmt: skip
    raise UserError(f"{folder} contains no safetensors weights ({WEIGHTS} or {INDEX}); save the model with "
                    "save_pretrained of transformers, or set model.init=random for random weights")  # fmt: skip


METADATA = ".metadata"
"""File with the index of a folder in torch's distributed format."""


def is_megatron(folder: Path) -> bool:
    """Returns whether a model folder is in Megatron's format (torch_dist), as `convert --to megatron` writes it."""
    return (folder / METADATA).exists()


def _weight_map(index: Path) -> dict[str, str]:
    """Returns the mapping from tensor names to file names in the index."""
    content = read_json_object(index)
    for key in ("metadata", "weight_map"):
        if not isinstance(content.get(key), dict):
            raise UserError(f"{index}: {key!r} must be a JSON object, because transformers requires it; copy or "
                            "download it again")  # fmt: skip
    names = content["weight_map"]
    if not names:
        raise UserError(f"{index} names no tensors; copy or download it again")
    for tensor, file in names.items():
        if not isinstance(file, str) or Path(file).name != file:
            wrong = "is outside of the folder" if isinstance(file, str) else "is not a file name"
            raise UserError(f"{index} assigns {tensor} to {file!r}, which {wrong}; copy the model folder again")
    return names


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Returns where each tensor of a model folder is stored, by name.

    Raises:
        UserError: a file is damaged, a tensor is in two files, or a tensor of the index is not in its file.
    """
    found: dict[str, StoredTensor] = {}
    for file in shard_files(folder):
        for name, tensor in _header(file).items():
            if name in found:
                raise UserError(f"{folder}: {name} is in both {found[name].file.name} and {file.name}, and programs "
                                "differ in which one they read; copy or save the model again")  # fmt: skip
            found[name] = tensor
    if (folder / INDEX).exists():
        for name, where in _weight_map(folder / INDEX).items():
            if (name not in found or found[name].file.name != where) and not is_needless(name, tied=True):
                raise UserError(f"{folder / INDEX} assigns {name} to {where}, which does not contain it; copy or "
                                "download the model folder again")  # fmt: skip
    return found


def is_needless(name: str, *, tied: bool) -> bool:
    """Returns whether models compute this tensor from others, so that the stored one is not used."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == HEAD)


def _header(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one safetensors file, which must be complete."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > min(_MAX_HEADER, size - 8):
                raise ValueError(f"its header has {length} bytes, but the file has only {size}")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _stored(file, 8 + length, entry) for name, entry in header.items()}
        end = _end(tensors.values(), 8 + length)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); copy or download it again") from None
    if size != end:
        raise UserError(f"{file} has {size} bytes instead of {end}; copy or download it again")
    return tensors


def _stored(file: Path, begin: int, entry: dict[str, Any]) -> StoredTensor:
    (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
    if not all(isinstance(one, int) and one > 0 for one in shape):
        raise ValueError(f"its header has {entry}")
    if entry["dtype"] in _BITS and (stop - start) * 8 != prod(shape) * _BITS[entry["dtype"]]:
        raise ValueError(f"its header has {entry}, where size and shape do not match")
    return StoredTensor(file, begin + start, begin + stop, entry["dtype"], shape)


def _end(tensors: Iterable[StoredTensor], begin: int) -> int:
    """Returns the end of the last tensor. Tensors must be contiguous."""
    at = begin
    for tensor in sorted(tensors, key=lambda one: (one.start, one.stop)):
        if tensor.start != at or tensor.stop < at:
            raise ValueError("its tensors overlap or leave a gap")
        at = tensor.stop
    return at


def check_tied(folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Checks that a head in the folder equals the embedding if config.json ties them.

    If they differ, transformers (5.24) does not tie them, but other programs do.

    Raises:
        UserError: they differ.
    """
    if is_tied(raw) and HEAD in tensors and EMBEDDING in tensors and not _same(tensors[HEAD], tensors[EMBEDDING]):
        raise UserError(f"{folder}: {HEAD} differs from {EMBEDDING}, but config.json ties them; set "
                        "tie_word_embeddings to false, or remove the tensor")  # fmt: skip


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        left = one.stop - one.start
        while left:
            block = first.read(min(left, _BLOCK))
            if not block or block != second.read(len(block)):
                return False
            left -= len(block)
    return True
