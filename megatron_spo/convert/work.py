"""Writes the files of a conversion with several processes, skipping those that an earlier attempt finished."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from megatron_spo.convert.formats.base import Record, Shard
from megatron_spo.convert.formats.table import FORMATS
from megatron_spo.convert.source import Model, open_model
from megatron_spo.errors import UserError
from megatron_spo.files import put_in_place, write_whole
from megatron_spo.meter import BYTES, Meter


@dataclass(frozen=True)
class Conversion:
    """A conversion, in a form that can be sent to worker processes.

    Attributes:
        source: Path of the model to convert.
        to: Format to write.
        folder: Working folder, `target`.partial.
        shard_bytes: Largest size of a file of weights.
    """

    source: Path
    to: str
    folder: Path
    shard_bytes: int

    @property
    def model(self) -> Path:
        """Folder of the written files, which is renamed to the target at the end."""
        return self.folder / "model"

    def record(self, name: str) -> Path:
        """Returns the path of the record that marks a file as finished."""
        return self.folder / "finished" / f"{name.replace('/', '.')}.json"


def write_shards(job: Conversion, model: Model, workers: int) -> dict[str, Record]:
    """Writes all files of weights; returns their records by file name.

    Raises:
        UserError: If a tensor cannot be read, or the disk is full.
    """
    shards = FORMATS[job.to].shards(model, job.shard_bytes)
    _prepare(job, model, shards)
    todo = [i for i, shard in enumerate(shards) if not job.record(shard.name).exists()]
    if missing := sum(shards[i].nbytes for i in todo):
        free = shutil.disk_usage(job.folder).free
        if free < missing:
            raise UserError(f"{job.folder} needs {missing:,} bytes, but only {free:,} are free; free some disk space")
    total = sum(shard.nbytes for shard in shards)
    with Meter(f"converting to {job.to}", total, BYTES, done=total - missing) as meter:
        if workers == 1 or len(todo) < 2:
            _write_some(job, shards, todo, meter.advance)
        else:
            _share_out(job, shards, todo, workers, meter)
    return {shard.name: json.loads(job.record(shard.name).read_text()) for shard in shards}


def plan_of(job: Conversion, model: Model) -> str:
    """Returns the digest of what is converted, and to what: format, configuration, and the files of the source."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in model.files]
    sizes = [(shard.name, shard.nbytes) for shard in FORMATS[job.to].shards(model, job.shard_bytes)]
    return hashlib.sha256(json.dumps([job.to, model.kind, model.config, stats, sizes]).encode()).hexdigest()


def _prepare(job: Conversion, model: Model, shards: Sequence[Shard]) -> None:
    """Prepares the working folder, and empties it if an earlier attempt was a different conversion."""
    fingerprint = plan_of(job, model)
    path = job.folder / "plan"
    if not path.exists() or path.read_text() != fingerprint:
        shutil.rmtree(job.folder, ignore_errors=True)
    for shard in shards:
        (job.model / shard.name).parent.mkdir(parents=True, exist_ok=True)
    for name in ("finished", "unfinished"):
        (job.folder / name).mkdir(exist_ok=True)
    write_whole(path, fingerprint)


def _write_some(job: Conversion, shards: Sequence[Shard], todo: Sequence[int], count: Callable[[int], None]) -> None:
    """Writes files, and calls `count` with the bytes of each."""
    parent = multiprocessing.parent_process()
    for shard in (shards[i] for i in todo):
        if parent is not None and not parent.is_alive():
            return
        partial = job.folder / "unfinished" / f"{Path(shard.name).name}.{os.getpid()}"
        try:
            record = FORMATS[job.to].write(partial, shard.items)
            put_in_place(partial, job.model / shard.name)
            write_whole(job.record(shard.name), json.dumps(record))
            count(shard.nbytes)
        except OSError as error:
            raise UserError(f"{job.model / shard.name} cannot be written ({error}); fix the cause and run the same "
                            "command again, which resumes from here") from error  # fmt: skip


def _share_out(job: Conversion, shards: Sequence[Shard], todo: Sequence[int], workers: int, meter: Meter) -> None:
    """Writes the files with several processes, each of which gets about the same number of bytes."""
    parts: list[list[int]] = [[] for _ in range(min(workers, len(todo)))]
    for i in sorted(todo, key=lambda i: -shards[i].nbytes):
        min(parts, key=lambda part: sum(shards[k].nbytes for k in part)).append(i)
    context = multiprocessing.get_context("spawn")  # a fork may hang, because torch has started threads
    ours, theirs = zip(*(context.Pipe(duplex=False) for _ in parts), strict=True)
    processes = [
        context.Process(target=_worker, args=(job, part, pipe), daemon=True)
        for part, pipe in zip(parts, theirs, strict=True)
    ]
    for process, pipe in zip(processes, theirs, strict=True):
        process.start()
        pipe.close()
    try:
        working: dict[Connection, BaseProcess] = dict(zip(ours, processes, strict=True))
        while working:
            for pipe in wait(list(working)):
                assert isinstance(pipe, Connection)
                said = _hear(working[pipe], pipe)
                if isinstance(said, int):
                    meter.advance(said)
                else:
                    del working[pipe]
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _hear(process: BaseProcess, pipe: Connection) -> int | None:
    """Returns the bytes that a worker has written, or None if it has ended; raises its error, if it failed."""
    try:
        said = pipe.recv()
    except EOFError:
        process.join()
        raise UserError(f"a worker process was killed (exit code {process.exitcode}); run the same command again to "
                        "resume from the finished files") from None  # fmt: skip
    if isinstance(said, Exception):
        raise said
    return said


def _worker(job: Conversion, todo: Sequence[int], pipe: Connection) -> None:
    outcome: Exception | None = None
    try:
        torch.set_num_threads(1)
        _write_some(job, FORMATS[job.to].shards(open_model(job.source, check=False), job.shard_bytes), todo, pipe.send)
    except Exception as error:
        outcome = error
    with contextlib.suppress(BrokenPipeError):  # the parent process was killed
        pipe.send(outcome)
