"""Checkpoint folders: when one is complete, how damage is found, and from which one training resumes.

    checkpoints/step_00000200/   Megatron's shards and metadata, and the seal, trainer.json, written last
    checkpoints/latest           the name of the newest complete one
    checkpoints/best             the name of the one with the best evaluation, if checkpoint.best is set

The seal holds the training state, the configuration, and the size and checksum of every other file.
"""

import io
import json
import pickle
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.metadata import Metadata

from megatron_spo.errors import UserError
from megatron_spo.files import write_whole
from megatron_spo.meter import BYTES, Meter

LATEST, BEST = "latest", "best"
SEAL = "trainer.json"
COMMON = "common.pt"
"""Megatron's file for what is not sharded. megatron-core 0.19 writes none, but still reads it if it is there."""
FORMAT = 2
_REMOVALS = ThreadPoolExecutor(1, "remove")
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
"""The only classes allowed in the index of a checkpoint; anything else in its pickle could run code."""


class Damaged(Exception):
    """A checkpoint folder is damaged or incomplete; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: its folder.
        state: the training state, as from `TrainState.to_dict`.
        record: facts about the run: the resolved configuration ("config") and data fingerprints ("data").
    """

    path: Path
    state: dict[str, Any]
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return int(self.state["step"])


def step_name(step: int) -> str:
    """Returns the name of the checkpoint folder after `step` steps."""
    return f"step_{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Returns the checkpoints in a `checkpoints` folder, complete or not, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit())


def checksum(path: Path) -> list[int | str]:
    """Returns size in bytes and xxh3_128 hash of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]


def seal(folder: Path, state: dict[str, Any], record: dict[str, Any], sums: dict[str, list[int | str]]) -> None:
    """Writes the seal, which completes a checkpoint.

    Args:
        folder: the checkpoint with all its other files.
        state, record: as in `Checkpoint`.
        sums: checksums that are already known, by file name; the others are computed.
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
    """Opens a checkpoint after checking that its files are unchanged and that its index is safe to load.

    Args:
        folder: the checkpoint.
        part, parts: only the checksums of every `parts`-th file, from index `part` on, are compared, so that several
            processes can share the work.
        scales: whether it may contain fp8 scales, which Transformer Engine unpickles when they are loaded.

    Raises:
        Damaged: a file is missing or changed, or the index is not safe to load.
    """
    content = _read_seal(folder)
    if stray := sorted(name for name in content["files"] if Path(name).is_absolute() or ".." in Path(name).parts):
        raise Damaged(f"{folder / SEAL} names {stray[0]!r}, which is outside of the folder")
    for name, expected in content["files"].items():
        if not (folder / name).is_file():
            raise Damaged(f"{folder / name} is missing")
        if (size := (folder / name).stat().st_size) != expected[0]:
            raise Damaged(f"{folder / name} has {size} bytes instead of {expected[0]}")
    mine = list(content["files"].items())[part::parts]
    total = sum(expected[0] for _, expected in mine)
    with Meter(f"checking {folder.name}", total, BYTES, shown=part == 0) as meter:
        for name, expected in mine:
            if checksum(folder / name) != expected:
                raise Damaged(f"{folder / name} does not match its checksum, so its content has changed")
            meter.advance(expected[0])
    if part == 0:
        _check_index(folder, scales=scales)
    return Checkpoint(folder, content["state"], content["record"])


def unchecked(folder: Path) -> Checkpoint:
    """Opens a checkpoint, checking only its seal.

    Raises:
        Damaged: the seal is missing or damaged.
    """
    content = _read_seal(folder)
    return Checkpoint(folder, content["state"], content["record"])


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


class _Inert:
    """Replaces classes that are not needed here; accepts any pickled state and does nothing."""

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
    """Reads the index of a folder in torch's distributed format, from any writer; loads only safe classes.

    Raises:
        Damaged: the index is missing, damaged or not safe to load.
    """
    return _load_index(folder, _PartsOfIndex)


def _load_index(folder: Path, unpickler: type[_Index]) -> Metadata:
    try:
        with (folder / _METADATA).open("rb") as file:
            index = unpickler(file).load()
        stray = [w.relative_path for w in index.storage_data.values() if Path(w.relative_path).name != w.relative_path]
    except Exception as error:  # a damaged or malicious pickle raises many kinds
        raise Damaged(f"{folder / _METADATA} is not safe to load ({_first_line(error)})") from error
    if stray:
        raise Damaged(f"{folder / _METADATA} names {stray[0]!r}, which is outside of the folder")
    return index


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _check_index(folder: Path, *, scales: bool) -> None:
    """Checks that loading this folder reads no file outside of it and runs no code from it.

    torch's reader unpickles the index and the non-tensor entries (megatron-core 0.16.1 writes some empty ones).
    """
    index = _load_index(folder, _Index)  # only what torch's own reader may load
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
        torch.load(folder / COMMON, map_location="cpu", weights_only=True)
    except Damaged:
        raise
    except Exception as error:  # many kinds, as above
        raise Damaged(f"an entry of {folder / _METADATA} is not safe to load ({_first_line(error)})") from error


def candidates(folder: Path) -> tuple[list[Path], list[str]]:
    """Returns the checkpoints in a `checkpoints` folder to try, the preferred one first, and problems of that folder.

    `latest` names the preferred one, as a user may have set it back. If it is missing or names none, the newest is
    first.
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
    """Renames a damaged checkpoint, so that it is not used any more but can still be inspected."""
    target = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)


def put_in_place(partial: Path, final: Path) -> None:
    """Moves a sealed checkpoint to its final name; replaces one of the same step from an earlier attempt."""
    if final.exists():
        _discard(final)
    partial.rename(final)


def remove_unfinished(folder: Path) -> None:
    """Removes the files that interrupted saves and removals have left."""
    for path in [*folder.glob(".step_*.partial-*"), *folder.glob(".step_*.old")]:
        shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, *, upto: int, keep: int, protected: Sequence[str]) -> None:
    """Removes all checkpoints up to step `upto`, except the newest `keep` and the protected ones."""
    old = [path for path in step_folders(folder) if path.name <= step_name(upto)]
    for path in old[:-keep]:
        if path.name not in protected:
            _discard(path)


def _discard(checkpoint: Path) -> None:
    """Renames a checkpoint, and deletes it in a thread: disks need a second for 7 GB, and training would wait."""
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    try:
        checkpoint.rename(old)
    except OSError:
        return  # as if it could not be deleted
    _REMOVALS.submit(shutil.rmtree, old, ignore_errors=True)


def wait_for_removals() -> None:
    """Returns when all old checkpoints of this process are deleted."""
    _REMOVALS.submit(int).result()  # the only thread runs it after everything else


def locate(source: Path) -> Path:
    """Returns the checkpoint folder for a run directory (its latest), a marker file in it, or the folder itself.

    Raises:
        UserError: there is no checkpoint.
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
