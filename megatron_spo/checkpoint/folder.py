"""Checkpoint folders: what makes one whole, how damage is found, and which one training goes on from.

    checkpoints/step_00000200/   Megatron's shards and metadata, and the seal, trainer.json, written last
    checkpoints/latest           the name of the newest complete one
    checkpoints/best             that of the one with the best evaluation, where checkpoint.best asks for it

The seal holds the state of the training, the configuration, and size and checksum of every other file.
"""

import io
import json
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.metadata import Metadata

from megatron_spo.errors import UserError
from megatron_spo.files import write_whole

LATEST, BEST = "latest", "best"
SEAL = "trainer.json"
FORMAT = 2
_METADATA = ".metadata"
_CLASSES = {
    "torch": {"Size", "dtype", "float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
}  # fmt: skip
"""All that the index of a checkpoint is made of; anything else in its pickle could run code."""


class Damaged(Exception):
    """A checkpoint folder is not whole; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        path: its folder.
        state: of the training, as TrainState gives it.
        record: what the run was: the resolved configuration ("config") and fingerprints ("data").
    """

    path: Path
    state: dict[str, Any]
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])


def step_name(step: int) -> str:
    """Name of the checkpoint folder after `step` steps."""
    return f"step_{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints of a `checkpoints` folder, whole or not, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit())


def checksum(path: Path) -> list[int | str]:
    """Size in bytes and xxh3_128 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]


def seal(folder: Path, state: dict[str, Any], record: dict[str, Any], sums: dict[str, list[int | str]]) -> None:
    """Complete a checkpoint: write its seal.

    Args:
        folder: with all other files in it.
        state, record: as in `Checkpoint`.
        sums: checksums that are known already, by file name; those of other files are computed.
    """
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: sums.get(name) or checksum(path) for name, path in paths.items()}
    body = {"format": FORMAT, "state": state, "record": record, "files": files}
    write_whole(folder / SEAL, json.dumps({**body, "checksum": _digest(body)}, indent=1))


def _digest(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read_seal(folder: Path) -> dict[str, Any]:
    path = folder / SEAL
    try:
        content = json.loads(path.read_text())
        given = content.pop("checksum", None) if isinstance(content, dict) else None
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} cannot be read ({error})") from None
    if not isinstance(content, dict) or content.get("format", 1) != FORMAT:
        found = content.get("format", 1) if isinstance(content, dict) else "unknown"
        raise Damaged(f"{path} has checkpoint format {found!r}; this version reads and writes format {FORMAT}")
    if given != _digest(content):
        raise Damaged(f"{path} does not match its own checksum")
    return content


def open_checkpoint(folder: Path, *, part: int = 0, parts: int = 1, scales: bool = False) -> Checkpoint:
    """A checkpoint whose files are as they were written, and whose index is safe to load.

    Args:
        folder: of the checkpoint.
        part, parts: checksums of every `parts`-th file from the one with index `part` are compared, so that several
            processes can share the reading.
        scales: the scales of fp8 may be in it, which Transformer Engine unpickles when they are loaded.

    Raises:
        Damaged
    """
    content = _read_seal(folder)
    if stray := sorted(name for name in content["files"] if Path(name).is_absolute() or ".." in Path(name).parts):
        raise Damaged(f"{folder / SEAL} names {stray[0]!r}, which is outside of the folder")
    for name, expected in content["files"].items():
        if not (folder / name).is_file():
            raise Damaged(f"{folder / name} is missing")
        if (size := (folder / name).stat().st_size) != expected[0]:
            raise Damaged(f"{folder / name} has {size} bytes instead of {expected[0]}")
    for name, expected in list(content["files"].items())[part::parts]:
        if checksum(folder / name) != expected:
            raise Damaged(f"{folder / name} does not match its checksum, so its content has changed")
    if part == 0:
        _check_index(folder, scales=scales)
    return Checkpoint(folder, content["state"], content["record"])


def unchecked(folder: Path) -> Checkpoint:
    """A checkpoint whose seal alone is looked at.

    Raises:
        Damaged
    """
    content = _read_seal(folder)
    return Checkpoint(folder, content["state"], content["record"])


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


class _Inert:
    """In place of a class that nothing here reads; takes whatever a pickle gives it and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _PartsOfIndex(_Index):
    def find_class(self, module: str, name: str) -> Any:
        if name == "MCoreMetadata":  # megatron.core.dist_checkpointing.strategies.torch, 0.15: a Metadata and more
            return Metadata
        return super().find_class(module, name) if name in _CLASSES.get(module, ()) else _Inert


def read_index(folder: Path) -> Metadata:
    """The index of a folder in torch's distributed format, by whatever it was written; only what is safe is loaded.

    Raises:
        Damaged
    """
    return _load_index(folder, _PartsOfIndex)


def _load_index(folder: Path, unpickler: type[_Index]) -> Metadata:
    try:
        with (folder / _METADATA).open("rb") as file:
            index = unpickler(file).load()
        stray = [w.relative_path for w in index.storage_data.values() if Path(w.relative_path).name != w.relative_path]
    except Exception as error:  # of many kinds, for a pickle that is torn or made to harm
        raise Damaged(f"{folder / _METADATA} is not safe to load ({_first_line(error)})") from error
    if stray:
        raise Damaged(f"{folder / _METADATA} names {stray[0]!r}, which is outside of the folder")
    return index


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _check_index(folder: Path, *, scales: bool) -> None:
    """Make sure that loading this folder reads no file outside of it and runs no code of it.

    torch's reader unpickles the index and the non-tensor entries (megatron-core 0.16.1 writes some of no content).
    """
    index = _load_index(folder, _Index)  # nothing but what torch's own reader may load
    try:
        for key, where in index.storage_data.items():
            kind = index.state_dict_metadata[key.fqn]
            if type(kind).__name__ == "BytesStorageMetadata":
                with (folder / where.relative_path).open("rb") as file:
                    file.seek(where.offset)
                    content = torch.load(io.BytesIO(file.read(where.length)), weights_only=True)
                if isinstance(content, torch.Tensor) and content.numel() and not scales:
                    raise Damaged(f"{folder / _METADATA} has an entry {key.fqn} of pickled bytes, which only a run "
                                  "with precision.fp8 may load")  # fmt: skip
        torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
    except Damaged:
        raise
    except Exception as error:  # of many kinds, as above
        raise Damaged(f"an entry of {folder / _METADATA} is not safe to load ({_first_line(error)})") from error


def candidates(folder: Path) -> tuple[list[Path], list[str]]:
    """Checkpoints of a `checkpoints` folder to try, the one to prefer first, and what is odd about that folder.

    `latest` decides: someone may have set it back. Where it is missing or names none, the newest comes first.
    """
    found = step_folders(folder)[::-1]
    try:
        named = (folder / LATEST).read_text().strip()
    except FileNotFoundError:
        return found, []
    except (OSError, UnicodeDecodeError) as error:
        return found, [f"{folder / LATEST} cannot be read ({error})"]
    if folder / named not in found:
        return found, [f"{folder / LATEST} names {named!r}, which does not exist"]
    return [folder / named, *(path for path in found if path.name < named)], []


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint so that nothing takes it for one; it is left for whoever wants to look."""
    target = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)


def put_in_place(partial: Path, final: Path) -> None:
    """Give a sealed checkpoint its name; one of the same step from an earlier attempt makes way."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """What interrupted saves have left."""
    for path in [*folder.glob(".step_*.partial-*"), *folder.glob(".step_*.old")]:
        shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, *, upto: int, keep: int, protected: Sequence[str]) -> None:
    """Remove all but the newest `keep` checkpoints up to step `upto` and the protected ones."""
    old = [path for path in step_folders(folder) if path.name <= step_name(upto)]
    for path in old[:-keep]:
        if path.name not in protected:
            shutil.rmtree(path, ignore_errors=True)


def locate(source: Path) -> Path:
    """The checkpoint folder meant by a run directory (its latest), by a marker in it, or by the folder itself.

    Raises:
        UserError
    """
    marker = source / "checkpoints" / LATEST if (source / "checkpoints").is_dir() else source
    if marker.name in (LATEST, BEST) and marker.is_file():
        return marker.parent / marker.read_text().strip()
    if (source / SEAL).is_file():
        return source
    raise UserError(
        f"{source} is neither a run directory with a checkpoint nor a checkpoint; give the output folder of a run or "
        "one of its checkpoints/step_* folders"
    )
