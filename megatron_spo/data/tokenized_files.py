"""Stores the tokenised rows of one source as memory-mapped Arrow streams."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_spo.data.arrow import to_array, to_numpy
from megatron_spo.data.chat_template import template_date
from megatron_spo.data.json_lines import RowProblem, parse_line, read_lines
from megatron_spo.data.pairs import RawSource, parse_row, without_nulls
from megatron_spo.data.rows import Example
from megatron_spo.data.tokenize import LengthLimits, Overlong, RowTokenizer, tokenizer_fingerprint
from megatron_spo.errors import UserError
from megatron_spo.meter import Meter
from megatron_spo.runtime.env import datasets_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from megatron_spo.config.schema import DataConfig

VERSION = 3
"""Increase this if tokenisation, the file format or stored messages change, so that older folders are not used."""
BATCH = 512
IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("line", pa.int64()),
        ("field", pa.string()),
        ("reason", pa.string()),
        ("overlong", pa.bool_()),
        ("prompt_length", pa.int32()),
        ("shared", pa.int32()),
        ("tokens", pa.int32()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
        ("row_hash", pa.uint64()),
        ("chosen_ids", IDS),
        ("rejected_ids", IDS),
    ]
)


class TokenizedSource:
    """All rows of one source in file order, including unusable ones. `row` counts from 0.

    Attributes:
        lines: int64 [n], line number of each row, counted from 1.
        usable: bool [n], whether each row is usable.
    """

    def __init__(self, folder: Path, *, label: str, unit: str) -> None:
        self.label, self.unit = label, unit
        files = json.loads((folder / "index.json").read_text())["files"]
        tables = [pa.ipc.open_stream(pa.memory_map(str(folder / file))).read_all() for file in files]
        self._table = pa.concat_tables(tables)
        self.lines: NDArray[np.int64] = self.column("line")
        self.usable: NDArray[np.bool_] = ~self.column("overlong") & (self.column("prompt_length") > 0)
        self._chosen = _Lists(self._table.column("chosen_ids"))
        self._rejected = _Lists(self._table.column("rejected_ids"))
        self._prompt, self._shared = self.column("prompt_length"), self.column("shared")

    def column(self, name: str) -> NDArray[Any]:
        """Returns a scalar column [n] as a NumPy array."""
        return to_numpy(self._table.column(name))

    def last_tokens(self) -> NDArray[np.int32]:
        """Returns [n] ids of the last token of the chosen response of each row; 0 for unusable rows."""
        return self._chosen.last()

    def example(self, row: int) -> Example:
        """Returns the token ids of a usable row, as views of the mapped file."""
        return Example(self._chosen[row], self._rejected[row], int(self._prompt[row]), int(self._shared[row]))

    def problem(self, row: int) -> tuple[int, str, str]:
        """Returns (line, field, reason) of an unusable row."""
        return int(self.lines[row]), self._table["field"][row].as_py(), self._table["reason"][row].as_py()

    def problems(self) -> Iterator[tuple[int, str, str]]:
        """Yields (line, field, reason) of all unusable rows."""
        return (self.problem(int(row)) for row in np.flatnonzero(~self.usable))


class _Lists:
    """Random access to a list column without creating Arrow scalars."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
        self._chunks = [(to_numpy(chunk.offsets), to_numpy(chunk.values)) for chunk in column.chunks]

    def last(self) -> NDArray[np.int32]:
        """Returns the last number of each list; 0 for empty lists."""
        parts = []
        for offsets, values in self._chunks:
            filled = offsets[1:] > offsets[:-1]
            part = np.zeros(len(filled), dtype=np.int32)
            part[filled] = values[offsets[1:][filled] - 1]
            parts.append(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        offsets, values = self._chunks[chunk]
        at = row - int(self._starts[chunk])
        part: NDArray[np.int32] = values[offsets[at] : offsets[at + 1]]
        return part


def tokenize_source(
    raw: RawSource,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    kind: str,
    progress: bool,
    cache: Path | None,
) -> TokenizedSource:
    """Returns the tokenised rows of a source, from the cache if possible. See `build_dataset` for the arguments."""
    from filelock import FileLock

    root = cache if cache is not None else datasets_cache() / "megatron_spo"
    limits = LengthLimits(
        data.max_length,
        data.truncation if data.truncation in ("left", "right") else None,
        data.longest_row,
    )
    key = json.dumps(
        [VERSION, raw.fingerprint, tokenizer_fingerprint(tokenizer), template_date(tokenizer), asdict(limits), kind],
        sort_keys=True,
    )
    folder = root / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not folder.exists():
        worker = functools.partial(_tokenize_batch, tokenizer=RowTokenizer(tokenizer, limits), file=raw.file, kind=kind)
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.exists():
                    _build(folder, raw, worker, num_proc=data.num_proc, progress=progress)
        except OSError as error:
            raise UserError(
                f"cannot store tokenised rows in {root} ({error}); set the environment variable "
                "HF_DATASETS_CACHE to another folder"
            ) from error
    return TokenizedSource(folder, label=raw.label, unit=raw.unit)


def _build(folder: Path, raw: RawSource, worker: Any, *, num_proc: int, progress: bool) -> None:
    """Tokenises into a temporary folder, then renames it, so that readers never see an incomplete folder."""
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        if num_proc == 1 and isinstance(raw.rows, pa.Table):
            files = [_write(work / "rows.arrow", raw.rows, worker, f"tokenising {raw.label}", progress=progress)]
        else:
            files = _map(work, raw, worker, num_proc=num_proc, progress=progress)
        (work / "index.json").write_text(json.dumps({"version": VERSION, "files": files}))
        if not folder.exists():
            os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(path: Path, rows: pa.Table, worker: Any, label: str, *, progress: bool) -> str:
    """Tokenises in this process without importing `datasets`, which takes a second. Returns the file name."""
    with Meter(label, len(rows), "rows", shown=progress) as meter, pa.ipc.new_stream(str(path), SCHEMA) as stream:
        for start in range(0, len(rows), BATCH):
            batch = rows.slice(start, BATCH)
            stream.write_table(worker(batch, range(start, start + len(batch))))
            meter.advance(len(batch))
    return path.name


def _map(work: Path, raw: RawSource, worker: Any, *, num_proc: int, progress: bool) -> list[str]:
    """Tokenises with `datasets`, in `num_proc` processes. Returns the file names."""
    import datasets

    rows = raw.rows
    if isinstance(rows, pa.Table):
        rows = datasets.Dataset.from_dict({name: to_numpy(rows[name]) for name in rows.column_names})
    with _silent(), _counting(work, Meter(f"tokenising {raw.label}", len(rows), "rows", shown=progress)) as counts:
        result = rows.with_format("arrow").map(
            functools.partial(_counted, worker=worker, counts=counts),
            batched=True,
            batch_size=BATCH,
            with_indices=True,
            remove_columns=rows.column_names,
            features=datasets.Features.from_arrow_schema(SCHEMA),
            num_proc=min(num_proc, len(rows)) if num_proc > 1 else None,
            cache_file_name=str(work / "rows.arrow"),
            load_from_cache_file=False,
            new_fingerprint=work.name,
        )
    return [Path(file["filename"]).name for file in result.cache_files]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Disables the progress bars of `datasets`, which would fill a log."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


@contextlib.contextmanager
def _counting(work: Path, meter: Meter) -> Iterator[Path]:
    """Shows the progress of several processes: each appends as many bytes to its file in the yielded folder as it has
    tokenised rows."""
    counts, ended = work / "counts", threading.Event()
    counts.mkdir()

    def follow() -> None:
        known = 0
        while not ended.wait(1.0):
            now = sum(file.stat().st_size for file in counts.iterdir())
            meter.advance(now - known)
            known = now

    thread = threading.Thread(target=follow, daemon=True)
    with meter:
        thread.start()
        try:
            yield counts
        finally:
            ended.set()
            thread.join()
            shutil.rmtree(counts)


def _counted(table: pa.Table, indices: Sequence[int], *, worker: Any, counts: Path) -> pa.Table:
    """Calls the worker and counts its rows."""
    result = worker(table, indices)
    with (counts / str(os.getpid())).open("ab") as file:
        file.write(bytes(len(indices)))
    return result


def _tokenize_batch(
    table: pa.Table, indices: Sequence[int], *, tokenizer: RowTokenizer, file: Path | None, kind: str
) -> pa.Table:
    """Converts one batch of raw rows to SCHEMA. Blank lines are skipped."""
    records = []
    for index, raw in zip(indices, _raw_rows(table, file), strict=True):
        record: dict[str, Any] = {"line": index + 1, "overlong": False}
        try:
            row = parse_line(raw) if isinstance(raw, bytes) else raw
            if row is None:
                continue
            record.update(_record(tokenizer.tokenize(parse_row(row, kind=kind))))
        except RowProblem as problem:
            record.update(_EMPTY, field=problem.field, reason=problem.reason, overlong=isinstance(problem, Overlong))
        records.append(record)
    columns = [to_array(field.type, [record.get(field.name) for record in records]) for field in SCHEMA]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _raw_rows(table: pa.Table, file: Path | None) -> Iterable[bytes | Mapping[str, Any]]:
    if file is None:
        return (without_nulls(row) for row in table.to_pylist())
    return read_lines(file, to_numpy(table["start"]), to_numpy(table["end"]))


def _record(example: Example) -> dict[str, Any]:
    chosen, rejected, prompt = example.chosen_ids, example.rejected_ids, example.prompt_length
    lengths = np.array([prompt, len(chosen), len(rejected)], dtype=np.int64)
    digest = hashlib.blake2b(lengths.tobytes() + chosen.tobytes() + rejected.tobytes(), digest_size=8).digest()
    return {
        "prompt_length": prompt,
        "shared": example.shared,
        "tokens": len(chosen) + max(len(rejected) - example.shared, 0),
        "chosen_tokens": len(chosen) - prompt,
        "rejected_tokens": max(len(rejected) - prompt, 0),
        "row_hash": int.from_bytes(digest, "little"),
        "chosen_ids": chosen,
        "rejected_ids": rejected,
    }


_EMPTY: dict[str, Any] = {
    "prompt_length": 0,
    "shared": 0,
    "tokens": 0,
    "chosen_tokens": 0,
    "rejected_tokens": 0,
    "row_hash": 0,
    "chosen_ids": np.zeros(0, dtype=np.int32),
    "rejected_ids": np.zeros(0, dtype=np.int32),
}
