"""The cache of the reference's log-probs, computed once and read memory-mapped.

Folder `<cache>/<name>-<first 12 digits of the data set's fingerprint>/`:

    records.npy   one fixed-size record per pair, in data set order
    index.json    version, what the records depend on, their count and checksum
    parts/        while filling: chunks of records, each with its own digest, written by any process

Every file is renamed into place after fsync, so a killed process leaves complete files or none. A part that is
damaged or has another fingerprint counts as missing. `finish` replaces a stale cache only when the new one is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from megatron_spo.errors import UserError
from megatron_spo.files import replacing

if TYPE_CHECKING:
    from megatron_spo.data.dataset import TokenizedSet

VERSION = 4
RECORD = np.dtype([("chosen", "<f4"), ("rejected", "<f4"), ("row_hash", "<u8")])
"""A record: sums of log-probs (nats) over the scored tokens of each response, and the hash of the row's token ids."""
REMEDY = "run: megatron-spo reference CONFIG.yaml"
DIGEST = 16
Records = NDArray[np.void]


@dataclass(frozen=True)
class ReferenceFingerprint:
    """Everything that a cached log-prob depends on; error messages name each part that differs."""

    weights: str
    tokenizer: str
    truncation: str
    precision: str
    dataset: str
    date: str = ""
    """Date given to the chat template; empty if the template does not use it, or if the cache does not record it."""

    def differences(self, found: dict[str, Any]) -> list[str]:
        """Returns one line for each part in which a cache differs from this fingerprint."""
        return [
            f"{_PARTS[part]}: the cache has {found.get(part, '')!r}, this run has {wanted!r}"
            for part, wanted in asdict(self).items()
            if found.get(part, "") != wanted
        ]


_PARTS = {
    "weights": "the reference's weights",
    "tokenizer": "the tokenizer or its chat template",
    "truncation": "truncation",
    "precision": "precision",
    "dataset": "the data set's rows",
    "date": "the date given to the chat template",
}


class ReferenceStore:
    """Memory-mapped log-probs of the reference; `open_reference` checks and opens it."""

    def __init__(self, records: Records, dataset: TokenizedSet, folder: Path) -> None:
        self.records, self._hashes = records, dataset.row_hashes
        self._dataset, self.folder = dataset, folder

    def __len__(self) -> int:
        return len(self.records)

    def get(self, indices: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Returns the summed log-probs (nats; chosen fp32 [B], rejected fp32 [B]) of data set rows `indices` [B]."""
        wanted = np.asarray(indices)
        rows = self.records[wanted]
        chosen, rejected = rows["chosen"], rows["rejected"]
        fine = np.isfinite(chosen) & np.isfinite(rejected) & (rows["row_hash"] == self._hashes[wanted])
        if not fine.all():
            where = self._dataset.describe(int(wanted[~fine][0]))
            raise UserError(f"reference cache {self.folder} is damaged: the record of {where} is invalid; {REMEDY}")
        return chosen, rejected


def open_reference(
    cache: str | Path, name: str, fingerprint: ReferenceFingerprint, dataset: TokenizedSet
) -> ReferenceStore:
    """Opens the complete cache of data set `name`.

    Raises:
        UserError: it is missing, incomplete, stale (the message names each part that differs) or damaged.
    """
    folder = cache_folder(cache, name, fingerprint)
    index = _read_index(folder)
    if index is None:
        raise UserError(_why_missing(Path(cache), name, fingerprint, dataset))
    differences = fingerprint.differences(index["fingerprint"])
    if differences:
        raise UserError(
            f"reference cache {folder} is stale; {REMEDY}\n" + "\n".join(f"  {line}" for line in differences)
        )
    records = _map_records(folder, index)
    if len(records) != len(dataset):
        raise UserError(
            f"reference cache {folder} is damaged: it has {len(records)} pairs instead of {len(dataset)}; {REMEDY}"
        )
    return ReferenceStore(records, dataset, folder)


class ReferenceWriter:
    """Fills the cache of one data set, chunk by chunk, from any number of processes.

    Chunks are ranges of data set indices and are written as a whole. One process calls `finish`.
    """

    def __init__(
        self, folder: Path, name: str, fingerprint: ReferenceFingerprint, dataset: TokenizedSet, chunk: int
    ) -> None:
        self._folder, self._fingerprint, self._dataset, self._chunk = folder, fingerprint, dataset, chunk
        self._parts = folder / "parts"
        self.name = name
        self.chunks = -(-len(dataset) // chunk)
        salt = json.dumps([VERSION, asdict(fingerprint), chunk, len(dataset)], sort_keys=True)
        self._salt = hashlib.blake2b(salt.encode(), digest_size=DIGEST).digest()
        self.complete = self._is_complete()

    @classmethod
    def open(
        cls,
        cache: str | Path,
        name: str,
        fingerprint: ReferenceFingerprint,
        dataset: TokenizedSet,
        chunk: int = 256,
    ) -> Self:
        """Starts or continues filling; if `complete` is set, nothing is left to do."""
        folder = cache_folder(cache, name, fingerprint)
        writer = cls(folder, name, fingerprint, dataset, chunk)
        if not writer.complete:
            with _writing(folder):
                (folder / "parts").mkdir(parents=True, exist_ok=True)
        return writer

    def missing_chunks(self) -> list[int]:
        """Returns the chunks that are missing, damaged, or from another model or data set."""
        return [] if self.complete else [k for k in range(self.chunks) if self._read_part(k) is None]

    def chunk_indices(self, k: int) -> NDArray[np.int64]:
        """Returns the data set indices of chunk `k`."""
        return np.arange(k * self._chunk, min((k + 1) * self._chunk, len(self._dataset)), dtype=np.int64)

    def write_chunk(self, k: int, chosen: ArrayLike, rejected: ArrayLike) -> None:
        """Writes the log-prob sums of chunk `k` (nats; rejected is 0 for SFT rows).

        Raises:
            UserError: a sum is not finite.
        """
        indices = self.chunk_indices(k)
        records = np.zeros(len(indices), dtype=RECORD)
        for field, values in (("chosen", chosen), ("rejected", rejected)):
            array = np.asarray(values, dtype=np.float32)
            assert array.shape == indices.shape, f"chunk {k} has {len(indices)} rows, {field} has shape {array.shape}"
            bad = np.flatnonzero(~np.isfinite(array))
            if len(bad):
                where = self._dataset.describe(int(indices[bad[0]]))
                raise UserError(
                    f"the reference gives a log-prob of {array[bad[0]]} for '{field}' in {where}; "
                    "check the model's weights and precision.dtype"
                )
            records[field] = array
        records["row_hash"] = self._dataset.row_hashes[indices]
        payload = records.tobytes()
        with _writing(self._folder), replacing(self._part(k)) as file:
            file.write(self._digest(k, payload) + payload)

    def finish(self) -> None:
        """Checks and merges all parts; does nothing if the cache is complete.

        Raises:
            UserError: a part is missing.
        """
        if self.complete:
            return
        missing = self.missing_chunks()
        if missing:
            count = len(self._dataset)
            done = count - sum(len(self.chunk_indices(k)) for k in missing)
            raise UserError(f"reference cache {self._folder} is incomplete: it has {done} of {count} pairs; {REMEDY}")
        header = io.BytesIO()
        form = {"descr": RECORD.descr, "fortran_order": False, "shape": (len(self._dataset),)}
        np.lib.format.write_array_header_1_0(header, form)
        checksum = xxhash.xxh3_128(header.getvalue())
        with _writing(self._folder):
            with replacing(self._folder / "records.npy") as file:
                file.write(header.getvalue())
                for k in range(self.chunks):
                    payload = self._read_part(k)
                    assert payload is not None, f"chunk {k} vanished while the cache was merged"
                    checksum.update(payload)
                    file.write(payload)
            index = {
                "version": VERSION,
                "fingerprint": asdict(self._fingerprint),
                "count": len(self._dataset),
                "xxh3_128": checksum.hexdigest(),
            }
            with replacing(self._folder / "index.json") as file:
                file.write(json.dumps(index, indent=2).encode())
            shutil.rmtree(self._parts)
        self.complete = True

    def _is_complete(self) -> bool:
        try:
            index = _read_index(self._folder)
            if index is None or self._fingerprint.differences(index["fingerprint"]):
                return False
            return len(_map_records(self._folder, index)) == len(self._dataset)
        except UserError:
            return False  # damaged, so it is filled again

    def _part(self, k: int) -> Path:
        return self._parts / f"{k:08d}.part"

    def _digest(self, k: int, payload: bytes) -> bytes:
        return hashlib.blake2b(self._salt + k.to_bytes(8, "little") + payload, digest_size=DIGEST).digest()

    def _read_part(self, k: int) -> bytes | None:
        """Returns the records of chunk `k`, or None if they are damaged or have another fingerprint."""
        try:
            content = self._part(k).read_bytes()
        except FileNotFoundError:
            return None
        payload = content[DIGEST:]
        whole = len(payload) == len(self.chunk_indices(k)) * RECORD.itemsize
        return payload if whole and content[:DIGEST] == self._digest(k, payload) else None


def cache_folder(cache: str | Path, name: str, fingerprint: ReferenceFingerprint) -> Path:
    """Returns the folder of the cache of data set `name`."""
    return Path(cache) / f"{_slug(name)}-{fingerprint.dataset[:12]}"


def is_absent(cache: str | Path, name: str, fingerprint: ReferenceFingerprint) -> bool:
    """Returns whether the cache of data set `name` has never been completed for these rows; a stale or damaged cache is
    not absent."""
    return not (cache_folder(cache, name, fingerprint) / "index.json").exists()


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name).strip("._") or "data"


def _read_index(folder: Path) -> dict[str, Any] | None:
    """Returns the index of a complete cache, or None if there is no index.

    Raises:
        UserError: the index cannot be read or has another format.
    """
    try:
        text = (folder / "index.json").read_text(encoding="utf-8")
        index = json.loads(text)
        known = {"count": int(index["count"]), "xxh3_128": str(index["xxh3_128"])}
        version, fingerprint = index["version"], dict(index["fingerprint"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"reference cache {folder} is damaged: index.json cannot be read; {REMEDY}") from error
    if version != VERSION:
        raise UserError(
            f"reference cache {folder} has format {version}, but this version reads format {VERSION}; {REMEDY}"
        )
    return {**known, "fingerprint": fingerprint}


def _map_records(folder: Path, index: dict[str, Any]) -> Records:
    """Returns the memory-mapped records after checking their size and checksum."""
    damaged = f"reference cache {folder} is damaged: records.npy"
    try:
        content = np.memmap(folder / "records.npy", np.uint8, mode="r")
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise UserError(f"{damaged} cannot be read ({error}); {REMEDY}") from error
    header = len(content) - index["count"] * RECORD.itemsize
    if header <= 0:
        raise UserError(f"{damaged} is too short for the {index['count']} pairs in index.json; {REMEDY}")
    if xxhash.xxh3_128(content.data).hexdigest() != index["xxh3_128"]:
        raise UserError(f"{damaged} has a wrong checksum; {REMEDY}")
    records: Records = np.asarray(content)[header:].view(RECORD)
    return records


def _why_missing(cache: Path, name: str, fingerprint: ReferenceFingerprint, dataset: TokenizedSet) -> str:
    """Returns the message for a cache that is incomplete, for other rows, or missing."""
    folder = cache_folder(cache, name, fingerprint)
    if any((folder / "parts").glob("*.part")):
        done = sum(
            max(part.stat().st_size - DIGEST, 0) // RECORD.itemsize for part in (folder / "parts").glob("*.part")
        )
        count = len(dataset)
        return f"reference cache {folder} is incomplete: it has {min(done, count)} of {count} pairs; {REMEDY}"
    for other in sorted(cache.glob(f"{_slug(name)}-" + "[0-9a-f]" * 12)):
        with contextlib.suppress(UserError):
            index = _read_index(other)
            if index is not None:
                lines = "".join(f"\n  {line}" for line in fingerprint.differences(index["fingerprint"]))
                return f"the reference cache for '{name}' in {cache} is for other rows ({other.name}):{lines}\n{REMEDY}"
    return f"there is no reference cache for '{name}' in {cache}; {REMEDY}"


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns file system errors into a UserError about the cache."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"reference cache {folder} cannot be written: {error}; set reference.cache to another folder"
        ) from error
