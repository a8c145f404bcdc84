"""Builds the packed rows of a rank for each step."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_spo.data.dataset import TokenizedSet
from megatron_spo.data.packing import PAIRS, Sampler, Stream, plan_rows
from megatron_spo.data.rows import PackedRow, build_row

if TYPE_CHECKING:
    from megatron_spo.config.schema import Config, DataConfig


@dataclass(frozen=True)
class Batch:
    """One global batch on one rank.

    Attributes:
        rows: rows of this rank; every rank has the same number of rows.
        indices: int64 [B], data set indices of the whole global batch.
        pairs, chosen_tokens, rejected_tokens, tokens: pairs, scored tokens of each response, and packed tokens without
            padding of the whole global batch.
        row_fill: tokens of the global batch divided by the maximum tokens of the rows of all ranks.
    """

    step: int
    rows: list[PackedRow]
    indices: NDArray[np.int64]
    pairs: int
    chosen_tokens: int
    rejected_tokens: int
    tokens: int
    row_fill: float


@dataclass(frozen=True)
class Multiples:
    """Numbers that must divide the padded tokens of a row and the number of rows of a rank."""

    tokens: int = 1
    rows: int = 1


NO_MULTIPLES = Multiples()


def row_multiples(config: Config) -> Multiples:
    """Returns the multiples that the configuration requires.

    Sequence and context parallelism split a row into equal parts, fp8 multiplies each part in blocks, and an
    interleaved pipeline processes rows in groups.
    """
    parallel, recipe = config.parallel, config.precision.recipe
    parts = (parallel.tensor if parallel.sequence else 1) * (2 * parallel.context if parallel.context > 1 else 1)
    block = 1 if recipe is None else recipe.gathered if parallel.sequence else recipe.multiple
    return Multiples(
        tokens=parts * block,
        rows=parallel.pipeline if parallel.virtual_pipeline else 1,
    )


class Loader:
    """Loads global batches of a data set for one of `ranks` data-parallel ranks.

    Args:
        dataset: the data set.
        data: row length and shuffling.
        global_batch_size: rows of a batch over all ranks.
        seed: seed of the order.
        rank, ranks: this data-parallel rank and their number.
        multiples: numbers that must divide tokens and rows.
        stream: which training set this is.
    """

    def __init__(
        self,
        dataset: TokenizedSet,
        data: DataConfig,
        *,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        multiples: Multiples = NO_MULTIPLES,
        stream: Stream = PAIRS,
    ) -> None:
        self.dataset = dataset
        self.row_length = data.longest_row
        self._rank, self._ranks, self._multiples, self._stream = rank, ranks, multiples, stream
        self._size, self._seed = global_batch_size, seed
        self._shuffle = data.shuffle
        self._sampler: Sampler | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[Batch]] | None = None

    @property
    def sampler(self) -> Sampler:
        """The order of the training rows, created on first use because evaluation sets do not need it."""
        if self._sampler is None:
            self._sampler = Sampler(
                self.dataset.source_sizes,
                self.dataset.weights,
                seed=self._seed,
                global_batch_size=self._size,
                shuffle=self._shuffle,
                stream=self._stream,
            )
        return self._sampler

    @property
    def steps_per_epoch(self) -> int:
        """Number of training batches in one epoch."""
        return self.sampler.steps_per_epoch

    def batch(self, step: int) -> Batch:
        """Returns the training batch of `step`, counted from 0 over all epochs, and prepares the next one."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._worker.submit(self._make, step)
        batch = self._ahead[1].result()
        self._ahead = step + 1, self._worker.submit(self._make, step + 1)
        return batch

    def _make(self, step: int) -> Batch:
        return self.batch_of(self.sampler.indices_of_step(step), step=step)

    def eval_batches(self) -> Iterator[Batch]:
        """Yields the whole data set once in file order; the last batch may be smaller."""
        for step, start in enumerate(range(0, len(self.dataset), self._size)):
            yield self.batch_of(np.arange(start, min(start + self._size, len(self.dataset))), step=step)

    def batch_of(self, indices: NDArray[np.int64], *, step: int = 0) -> Batch:
        """Returns a batch of the given data set indices, with rows distributed over the ranks."""
        data = self.dataset
        tokens = data.tokens[indices]
        plan = plan_rows(tokens, row_length=self.row_length, ranks=self._ranks, rows_multiple=self._multiples.rows)[
            self._rank
        ]
        rows = [
            build_row([(int(indices[i]), data.get(int(indices[i]))) for i in row], multiple=self._multiples.tokens)
            for row in plan
        ]
        return Batch(
            step=step,
            rows=rows,
            indices=indices,
            pairs=len(indices),
            chosen_tokens=int(data.chosen_tokens[indices].sum()),
            rejected_tokens=int(data.rejected_tokens[indices].sum()),
            tokens=int(tokens.sum()),
            row_fill=float(tokens.sum()) / (len(rows) * self._ranks * self.row_length),
        )

    def empty_row(self) -> PackedRow:
        """Returns a row without pairs, for a rank that has fewer rows than others."""
        return build_row([], multiple=self._multiples.tokens)
