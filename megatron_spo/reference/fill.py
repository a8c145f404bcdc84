"""Fills the reference cache by forward passes."""

import gc
import logging
from collections.abc import Collection

import numpy as np
import torch

import megatron_spo.runtime.megatron_import  # noqa: F401  (before the modules that import Megatron)
from megatron_spo.config.schema import Config
from megatron_spo.data.dataset import TokenizedSet
from megatron_spo.data.loader import Loader, row_multiples
from megatron_spo.data.rows import PackedRow
from megatron_spo.errors import UserError
from megatron_spo.meter import Meter
from megatron_spo.model.forward import score_rows
from megatron_spo.model.optimizer import lower_precision
from megatron_spo.prepare import Inputs, join, make_model, read_inputs, shows_progress
from megatron_spo.reference.cache import ReferenceWriter
from megatron_spo.reference.fingerprint import reference_fingerprint, weights_fingerprint
from megatron_spo.runtime.processes import Runtime, agreed

LOG = logging.getLogger(__name__)


def fill(config: Config) -> None:
    """Scores every pair of every data set with the reference model and writes the sums to `reference.cache`.

    Chunks of pairs are distributed over the data-parallel ranks; the rank that scores a chunk writes it. Chunks from an
    earlier call are kept, and a complete cache is not changed.

    Raises:
        UserError: on every rank alike.
    """
    if config.reference.cache is None:
        raise UserError("reference.cache is not set; set it to the folder for the reference's log-probs")
    config = config.of_reference
    runtime = join(config)
    inputs = read_inputs(config, runtime)
    if runtime.is_main:
        rows = ", ".join(f"{len(dataset)} rows of {name}" for name, dataset in inputs.named_sets().items())
        LOG.info(f"reference pass over {rows}; the log-probs go to {config.reference.cache}")
    runtime.progress.phase("building and loading", times=4)
    filled = fill_missing(config, inputs, weights_fingerprint(config, inputs), runtime)
    for name, dataset in inputs.named_sets().items():
        known = "" if name in filled else ", already complete"
        if runtime.is_main:
            print(f"reference {name}: {len(dataset)} rows in {config.reference.cache}{known}")


def fill_missing(
    config: Config, inputs: Inputs, weights: str, runtime: Runtime, names: Collection[str] | None = None
) -> list[str]:
    """Fills the caches that are not complete, of the data sets `names` (None: all); returns the names of those.

    Raises:
        UserError: on every rank alike.
    """
    assert config.reference.cache is not None
    writers = {}
    for name, dataset in inputs.named_sets().items():
        if names is None or name in names:
            fingerprint = reference_fingerprint(config, inputs, dataset, weights)
            writers[name] = ReferenceWriter.open(config.reference.cache, name, fingerprint, dataset)
    open_ones = {name: writer for name, writer in writers.items() if not writer.complete}
    if open_ones:
        _fill(config, inputs, open_ones, runtime)
        gc.collect()  # `train` builds its model next
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
    return list(open_ones)


def _fill(config: Config, inputs: Inputs, writers: dict[str, ReferenceWriter], runtime: Runtime) -> None:
    chunks = [lower_precision(chunk.eval(), chunk.config) for chunk in make_model(config, inputs)]
    for name, writer in writers.items():
        runtime.progress.phase(f"reference of {name}")
        _score(chunks, writer, inputs.named_sets()[name], config, runtime)
        runtime.progress.phase(f"merging the cache of {name}", times=4)
        torch.distributed.barrier()
        with agreed():
            if runtime.is_main:
                writer.finish()


def _score(
    chunks: list[torch.nn.Module], writer: ReferenceWriter, dataset: TokenizedSet, config: Config, runtime: Runtime
) -> None:
    """Scores this data-parallel rank's share of the missing chunks."""
    loader = Loader(dataset, config.data, global_batch_size=1, seed=0, multiples=row_multiples(config))
    missing = writer.missing_chunks()
    torch.distributed.barrier()  # no rank may write before every rank has listed the missing chunks
    ranks, sizes = runtime.topology.data, [len(writer.chunk_indices(chunk)) for chunk in missing]
    task, unit = f"reference pass over {writer.name}", "pairs" if dataset.has_rejected else "rows"
    done = len(dataset) - sum(sizes)
    with Meter(task, len(dataset), unit, done=done, shown=shows_progress(config)) as meter:
        for turn in range(0, len(missing), ranks):
            chunk = next(iter(missing[turn + runtime.data_rank : turn + ranks]), None)
            indices = np.zeros(0, dtype=np.int64) if chunk is None else writer.chunk_indices(chunk)
            rows = loader.batch_of(indices).rows
            padded = rows + [loader.empty_row()] * (_rows_in_step(len(rows), runtime) - len(rows))
            counted = _Counted(meter, len(missing[turn : turn + ranks]))
            scored = score_rows(chunks, padded, runtime=runtime, begun=counted.begun)[: len(rows)]
            if runtime.holds_results and chunk is not None:
                order = torch.cat([torch.from_numpy(row.pairs) for row in rows])
                chosen, rejected = torch.cat(scored).cpu()[torch.argsort(order)].numpy().T
                writer.write_chunk(chunk, chosen, rejected)
            meter.advance(sum(sizes[turn : turn + ranks]) - counted.pairs)


class _Counted:
    """Advances the meter row by row within the chunks of a turn, as if all data-parallel ranks were equally fast."""

    def __init__(self, meter: Meter, ranks: int) -> None:
        self._meter, self._ranks, self._running, self.pairs = meter, ranks, 0, 0

    def begun(self, row: PackedRow) -> None:
        self._meter.advance(self._running)
        self.pairs += self._running
        self._running = len(row.pairs) * self._ranks


def _rows_in_step(rows: int, runtime: Runtime) -> int:
    """Returns how many rows a rank with `rows` rows must run, as ranks that share experts run every row together."""
    from megatron.core import parallel_state  # here, because prepare.py must import Megatron first

    most = torch.tensor(rows, device=runtime.device)
    group = parallel_state.get_expert_model_parallel_group()
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=group)
    return int(most)
