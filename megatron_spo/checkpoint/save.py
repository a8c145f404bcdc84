"""Saves the training state in Megatron's torch_dist format, which can be loaded in any layout.

A checkpoint is written under a temporary name and gets its final name when it is complete on every rank; the marker
`latest` is updated last. A thread on each rank writes the files, so training can continue meanwhile. Of a model with
adapters, only the adapters are written.
"""

import queue
import secrets
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_spo.checkpoint import folder as checkpoint_folder
from megatron_spo.checkpoint.contents import contents, weights
from megatron_spo.checkpoint.folder import BEST, COMMON, LATEST, step_name
from megatron_spo.files import write_whole
from megatron_spo.model.optimizer import Trainable
from megatron_spo.runtime.megatron_versions import own_writer
from megatron_spo.runtime.processes import on_main

_BACKEND = ("torch_dist", 1)
_FILES = 4
"""Files that a rank writes; the checksum of one is computed while the next one is written."""


class SaveFailed(Exception):
    """A checkpoint could not be written; raised on every rank alike. Earlier checkpoints are unchanged."""


class SavedState(Protocol):
    """The part of a checkpoint besides weights and optimizer."""

    @property
    def step(self) -> int:
        """Number of steps done."""

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluation so far, by checkpoint.best."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the state as plain data."""


class Saver:
    """Writes checkpoints from all ranks together, one at a time."""

    def __init__(
        self, folder: Path, trainable: Trainable, record: dict[str, Any], *, keep: int, weights_only: bool = False
    ) -> None:
        """Sets up saving; writes nothing yet.

        Args:
            folder: the `checkpoints` folder of the run.
            trainable: model and optimizer.
            record: facts about the run, stored in the seal.
            keep: number of newest checkpoints to keep.
            weights_only: write no optimizer state; the model can be exported, but training cannot resume.
        """
        self.folder, self.last_saved, self.nbytes, self._began = folder, "", 0, 0.0
        self._trainable, self._record, self._keep, self._weights_only = trainable, record, keep, weights_only
        self._open: _Writing | None = None
        if not hasattr(filesystem_async, "_results_queue"):
            raise RuntimeError("Megatron-Core no longer has filesystem_async._results_queue; update Saver.start")

    @property
    def is_open(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._open is not None

    @property
    def seconds(self) -> float:
        """Seconds since the last `start`."""
        return time.monotonic() - self._began

    def start(self, state: SavedState, *, in_background: bool) -> None:
        """Starts writing the current weights, optimizer and `state`; `finished` completes the checkpoint.

        With `in_background`, the weights may change as soon as this returns.

        Raises:
            SaveFailed: the disk has too little space, or the folder cannot be written to.
        """
        assert self._open is None
        self._began = time.monotonic()
        partial = Path(on_main(lambda: str(self._make_partial(state.step)), SaveFailed))
        self._trainable.gather_weights()
        everything = weights(self._trainable) if self._weights_only else contents(self._trainable, loading=False)[0]
        sharded, common = save_preprocess(everything)
        self._check_room(sharded)
        for one in _sharded_tensors(sharded):
            one.data = _without_neighbours(one.data)
        strategy = _Strategy(*_BACKEND, thread_count=_FILES)
        on_main(lambda: torch.save(common, partial / COMMON), SaveFailed)
        filesystem_async._results_queue = queue.SimpleQueue()  # Megatron's own would start a process
        request = strategy.async_save(sharded, str(partial), **own_writer())
        live = {_storage(tensor.data) for tensor in _sharded_tensors(sharded)}
        files = _Files(request, strategy.writer, live if in_background else None)
        self._open = _Writing(state, partial, strategy, files)

    def finished(self, *, wait: bool) -> bool:
        """Completes the open checkpoint if all ranks have written it; with `wait`, waits for them.

        Returns:
            Whether a checkpoint was completed.

        Raises:
            SaveFailed: a rank could not write it.
        """
        if self._open is None or not self._open.files.written(wait=wait):
            return False
        writing, self._open = self._open, None
        try:
            self._complete(writing)
        except SaveFailed:
            on_main(lambda: shutil.rmtree(writing.partial, ignore_errors=True), SaveFailed)
            raise
        self.last_saved = step_name(writing.state.step)
        return True

    def _make_partial(self, step: int) -> Path:
        """Creates a folder with a new name, as a rank of a dead job may still write to an earlier one."""
        partial = self.folder / f".{step_name(step)}.partial-{secrets.token_hex(4)}"
        checkpoint_folder.remove_unfinished(self.folder)
        partial.mkdir(parents=True)
        return partial

    def _check_room(self, sharded: dict[str, Any]) -> None:
        here = sum(t.data.nbytes for t in _sharded_tensors(sharded) if is_main_replica(t.replica_id))
        total = torch.tensor([here], dtype=torch.int64, device=torch.cuda.current_device())
        dist.all_reduce(total)
        self.nbytes = int(total)

        def check() -> None:
            free = shutil.disk_usage(self.folder).free
            if free < self.nbytes:
                raise OSError(f"the checkpoint needs {self.nbytes:,} bytes, but only {free:,} are free")

        on_main(check, SaveFailed)

    def _complete(self, writing: "_Writing") -> None:
        written = _plain(writing.strategy.writer.retrieve_write_results())
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, (written, writing.files.sums))
        failures = [f"rank {rank}: {result}" for rank, (result, _) in enumerate(outcomes) if isinstance(result, str)]
        if failures:
            raise SaveFailed("; ".join(failures[:4]))

        def complete() -> None:
            partial, step = writing.partial, writing.state.step
            writing.strategy.writer.finish(writing.strategy.index, [result for result, _ in outcomes])
            save_config(CheckpointingConfig(*_BACKEND), str(partial))
            sums = {name: entry for _, some in outcomes for name, entry in some.items()}
            checkpoint_folder.seal(partial, writing.state.to_dict(), self._record, sums)
            checkpoint_folder.put_in_place(partial, self.folder / step_name(step))
            write_whole(self.folder / LATEST, step_name(step))
            protected = self._mark_best(writing.state)
            checkpoint_folder.prune(self.folder, upto=step, keep=self._keep, protected=protected)

        on_main(complete, SaveFailed)

    def _mark_best(self, state: SavedState) -> list[str]:
        if state.best_step is None:
            return []
        name = step_name(state.best_step)
        if (self.folder / name).exists():
            write_whole(self.folder / BEST, name)
        return [name]


@dataclass(frozen=True)
class _Writing:
    """A checkpoint that is being written."""

    state: SavedState
    partial: Path
    strategy: "_Strategy"
    files: "_Files"


class _Strategy(TorchDistSaveShardedStrategy):
    """Megatron's strategy; it also keeps its writer, and the index that must be written at the end.

    Megatron's own last step (megatron-core 0.16.1, save_state_dict_async_finalize) lets the other ranks wait forever if
    the main process cannot write the index.
    """

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *more: Any) -> AsyncRequest:
        self.writer, self.index = writer, planned[1]
        return super()._get_save_and_finalize_callbacks(writer, planned, *more)


class _Files:
    """Writes this rank's files of a checkpoint in a thread.

    Megatron's own writers (megatron-core 0.16.1, TemporalAsyncCaller and write_preloaded_data_multiproc) are forked
    children. Forking a process that has threads may hang, and every rank has threads: of gloo or NCCL, the watchdog and
    the loader.
    """

    def __init__(self, request: AsyncRequest, writer: FileSystemWriterAsync, live: set[int] | None) -> None:
        """`live`: storages that training may change while the thread writes; None writes without a thread."""
        self.sums: dict[str, list[int | str]] = {}
        self._writer = writer
        self._transforms = request.async_fn.args[0] if request.async_fn else []
        self._buckets = request.preload_fn() if request.preload_fn else []
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        if live is not None:
            self._buckets = [_copied(bucket, live) for bucket in self._buckets]
            self._thread.start()
        else:
            self._thread.run()

    def written(self, *, wait: bool) -> bool:
        """Returns whether all ranks have written their files; all ranks must call it together."""
        if wait and self._thread.ident is not None:
            self._thread.join()
        open_files = torch.tensor([int(self._thread.is_alive())], device=torch.cuda.current_device())
        dist.all_reduce(open_files)
        return not int(open_files)

    def _write(self) -> None:
        """Writes the files and computes their checksums while the content is still in the page cache."""
        outcomes: dict[int, Any] = {}
        failure: Exception | None = None
        try:
            with ThreadPoolExecutor(1, "checksum") as pool:
                sums: dict[str, Future[list[int | str]]] = {}
                for i, bucket in enumerate(self._buckets):
                    results, counter = queue.Queue[Any](), queue.Queue[int]()
                    counter.put(i)
                    self._writer.write_preloaded_data(self._transforms, i, bucket, results, counter, use_fsync=True)
                    _, outcome = results.get()
                    if isinstance(outcome, Exception):
                        raise outcome
                    outcomes[i], path = outcome, Path(bucket[0])
                    sums[path.name] = pool.submit(checkpoint_folder.checksum, path)
                self.sums = {name: found.result() for name, found in sums.items()}
        except Exception as error:  # reported by the main thread on every rank
            failure = error
        if self._buckets:
            self._writer.results_queue.put(failure or outcomes)
        self._buckets = []


def _copied(bucket: Any, live: set[int]) -> Any:
    """Returns the bucket with copies of its live tensors; on a CPU, Megatron does not copy them."""
    path, key, (texts, tensors) = bucket
    return path, key, (texts, [(item, t.clone() if _storage(t) in live else t) for item, t in tensors])


def _without_neighbours(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the same memory as a tensor with a storage of its size; Megatron copies a part of a larger storage."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return tensor
    bytes_of = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return torch.from_numpy(bytes_of).view(tensor.dtype).reshape(tensor.shape)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _sharded_tensors(sharded: dict[str, Any]) -> list[ShardedTensor]:
    """Returns the sharded tensors that hold data on this rank."""
    return [v for v in nested_values(sharded) if isinstance(v, ShardedTensor) and v.data is not None]


def _plain(results: Any) -> Any:
    """Returns the write results, or the reason of a failure as text (torch's exceptions here include a traceback)."""
    return results if isinstance(results, list) else str(results[0]).removeprefix("Worker failure: ")
