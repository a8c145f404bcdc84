"""Hugging Face model folders: find them, read slices of their tensors, fingerprint and write them."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_spo.errors import UserError
from megatron_spo.model.tensors import LazyTensor

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 2**30
_SIDE_FILES = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt",
               "chat_template*", "added_tokens.json")  # fmt: skip


def locate_model(path: str) -> Path:
    """The folder of a model: `path` itself, or the local copy of a hub id, downloaded when it is not cached.

    Raises:
        UserError: neither a folder nor a hub id that can be fetched.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.path {path!r} is neither a folder nor a model that could be fetched from the hub "
            f"({type(error).__name__}); give the path of a Hugging Face model folder"
        ) from error


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted.

    Raises:
        UserError: none there, or one that the index names is missing.
    """
    index = folder / INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if stray := [name for name in names if Path(name).name != name]:
            raise UserError(
                f"{index} names {stray[0]!r}, which lies outside of the folder; copy the model folder again"
            )
        if absent := [name for name in names if not (folder / name).exists()]:
            raise UserError(f"{index} names {absent[0]}, which is not there; copy the whole model folder")
        return [folder / name for name in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if (folder / ".metadata").exists():
        raise UserError(f"{folder} is a Megatron model folder; model.path must be a Hugging Face one, of which each "
                        f"rank reads its part: megatron-spo convert {folder} DST --to hf")  # fmt: skip
    raise UserError(f"{folder} holds no safetensors weights (model.safetensors or {INDEX}); set model.init=random "
                    "to start from random weights, or save the model with transformers' save_pretrained")  # fmt: skip


class HFWeights:
    """The tensors of a model folder, opened lazily: only the slices asked for are read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: list[Any] = []
        self._where: dict[str, Any] = {}
        for path in shard_files(folder):
            try:
                handle = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise UserError(f"{path} is damaged ({error}); copy or download it again") from error
            self._handles.append(handle)
            self._where.update(dict.fromkeys(handle.keys(), handle))

    def __enter__(self) -> "HFWeights":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._handles.clear()
        self._where.clear()

    def names(self) -> set[str]:
        """Names of all tensors in the folder."""
        return set(self._where)

    def slice(self, name: str) -> LazyTensor:
        """One tensor, unread.

        Raises:
            UserError: the folder does not hold it.
        """
        if name not in self._where:
            raise UserError(f"{self.folder} lacks the tensor {name}, which its config.json calls for")
        return self._where[name].get_slice(name)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(raw: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """What identifies a model: its config.json and the digests of its safetensors files, by their names."""
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode())
    for name, content in sorted(digests.items()):
        digest.update(f"{name} {content}".encode())
    return digest.hexdigest()


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what comes along with the weights: tokenizer, chat template and generation config."""
    for pattern in _SIDE_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
