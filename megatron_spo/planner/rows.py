"""Lengths of the pairs of a run, measured or assumed, and the packed rows that result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_spo.config.data_source import DataSource
from megatron_spo.config.model_shape import ModelShape
from megatron_spo.config.schema import Config, DataConfig
from megatron_spo.data.loader import row_multiples
from megatron_spo.data.packing import plan_rows

if TYPE_CHECKING:
    from megatron_spo.data.dataset import TokenizedSet

Int64 = NDArray[np.int64]

SPREAD = 0.6
"""Standard deviation of the logarithm of assumed lengths. Lengths of instruction data are about lognormal."""
BLOCK, STRIP = 16, 64
"""Attention pads queries and keys to multiples of BLOCK and processes STRIP queries at a time (model/attention.py)."""
SAMPLED_BATCHES = 8


@dataclass(frozen=True)
class Lengths:
    """Token counts of each pair, int64 [n]: prompt, shared prefix, and tail of each sequence; `source` for messages."""

    prompt: Int64
    shared: Int64
    chosen_tail: Int64
    rejected_tail: Int64
    source: str

    def __len__(self) -> int:
        return len(self.prompt)

    def without_rejected(self) -> Lengths:
        """Returns the lengths of SFT rows with the same prompts and chosen responses."""
        return replace(self, rejected_tail=np.zeros_like(self.rejected_tail))

    @property
    def tokens(self) -> Int64:
        """Packed tokens of each pair."""
        return self.shared + self.chosen_tail + self.rejected_tail

    @property
    def entries(self) -> Int64:
        """Scored positions of each pair. A response token that both responses share counts once."""
        return self.tokens - self.prompt

    def visible(self, shape: ModelShape) -> Int64:
        """Returns the number of necessary (query, key) pairs of each pair, averaged over the layers."""
        windowed = len(shape.sliding_layers)
        whole, within = self._visible(None), self._visible(shape.sliding_window)
        return ((shape.layers - windowed) * whole + windowed * within) // shape.layers

    def _visible(self, window: int | None) -> Int64:
        def of_sequence(length: Int64) -> Int64:
            growing = length if window is None else np.minimum(length, window)
            return growing * (growing + 1) // 2 + (length - growing) * growing

        s = self.shared  # these queries belong to both sequences
        return of_sequence(s + self.chosen_tail) + of_sequence(s + self.rejected_tail) - of_sequence(s)


def _once(method: Callable[[RowSize, int], int]) -> Callable[[RowSize, int], int]:
    """Caches a property of a row for each context-parallel size, because hundreds of layouts need it."""

    @wraps(method)
    def known(self: RowSize, context: int) -> int:
        key = (method.__name__, context)
        if key not in self.known:
            self.known[key] = method(self, context)
        return self.known[key]

    return known


@dataclass(frozen=True)
class RowSize:
    """Sizes of a packed row.

    Attributes:
        tokens, real: tokens with and without padding.
        entries: scored positions.
        visible: necessary (query, key) pairs of attention.
        segments: int64 [S, 2], queries and keys of each attention segment (model/segments.py).
    """

    tokens: int
    real: int
    entries: int
    visible: int
    segments: Int64
    known: dict[tuple[str, int], int] = field(default_factory=dict, repr=False, compare=False)

    @_once
    def queries(self, context: int) -> int:
        """Returns the number of queries on a context-parallel rank, with padding."""
        return int(_in_blocks(-(-self.segments[:, 0] // context)).sum())

    @cached_property
    def keys(self) -> int:
        """Number of keys of all segments, with padding."""
        return int(_in_blocks(self.segments[:, 1]).sum())

    def mask(self, context: int) -> int:
        """Returns the number of (query, key) pairs of all segments on a context-parallel rank, with padding."""
        queries = _in_blocks(-(-self.segments[:, 0] // context))
        return int((queries * _in_blocks(self.segments[:, 1])).sum())

    @_once
    def computed(self, context: int) -> int:
        """Returns the number of (query, key) pairs that attention computes on a context-parallel rank: strips of
        queries, each with the keys that its last query attends to."""
        queries, keys = self.segments.T[:, :, None]
        here = _in_blocks(-(-queries // context))
        begin = np.arange(0, int(here.max()), STRIP)
        seen = keys - queries + np.minimum((begin + STRIP) * context, queries)
        return int((np.clip(here - begin, 0, STRIP) * _in_blocks(seen)).sum())


def segments_of(shared: Int64, chosen: Int64, rejected: Int64, padding: int) -> Int64:
    """Returns the queries and keys [S, 2] of the segments of a row's pairs and of its padding."""
    first = np.stack([shared + chosen, shared + chosen], axis=1)
    second = np.stack([rejected, shared + rejected], axis=1)
    every = np.concatenate([first, second, [[padding, padding]]]).astype(np.int64)
    return every[every[:, 0] > 0]


def _in_blocks(length: Int64) -> Int64:
    return -(-length // BLOCK) * BLOCK


def lengths_of(dataset: TokenizedSet, source: str) -> Lengths:
    """Returns the lengths of a tokenised data set."""
    prompt, shared = dataset.prompt_tokens, dataset.shared_tokens
    chosen = prompt + dataset.chosen_tokens - shared
    return Lengths(prompt, shared, chosen, dataset.tokens - shared - chosen, source)


def assumed_lengths(prompt: int, response: int, pairs: int, max_length: int) -> Lengths:
    """Returns lognormal lengths with these medians, cut at `max_length`. The result is deterministic."""
    generator = np.random.Generator(np.random.PCG64(0))

    def draw(median: int, most: Int64 | int) -> Int64:
        drawn = generator.lognormal(np.log(median), SPREAD, pairs).astype(np.int64)
        return np.maximum(np.minimum(drawn, most), 1)

    prompts = draw(prompt, max_length // 2)
    source = f"assumed: lognormal, medians {prompt} (prompt) and {response} (response) tokens"
    return Lengths(prompts, prompts, draw(response, max_length - prompts), draw(response, max_length - prompts), source)


def is_at_hand(sources: Sequence[DataSource], tokenizer: str) -> bool:
    """Returns whether data and tokenizer are available locally."""
    return Path(tokenizer).is_dir() and all(Path(one.path).exists() for one in sources)


def measured_lengths(
    data: DataConfig, sources: Sequence[DataSource], tokenizer: str, kind: str, *, seed: int | None = None
) -> Lengths:
    """Tokenises the sources, or reads them from the cache, and returns their lengths.

    Args:
        data, sources, tokenizer, kind: as for `build_dataset`.
        seed: seed that draws `data.rows` of the rows; None: the lengths of all rows.

    Raises:
        UserError: data or tokenizer cannot be read.
    """
    from megatron_spo.data.dataset import build_dataset
    from megatron_spo.data.tokenize import load_tokenizer

    dataset = build_dataset(sources, data, load_tokenizer(tokenizer, data.chat_template), kind=kind)
    if seed is not None and data.rows is not None:
        dataset = dataset.drawn(data.rows, seed)
    return lengths_of(dataset, f"measured on {', '.join(source.path for source in sources)}")


def steps_in(config: Config, pairs: int) -> int:
    """Returns the number of optimizer steps of a run with this number of training pairs."""
    training = config.training
    if training.steps is not None:
        return training.steps
    return max(1, math.ceil((training.epochs or 1.0) * math.ceil(pairs / training.global_batch_size) - 1e-9))


Batch = list[list[RowSize]]
"""The rows of each data-parallel rank in one step."""


def planned_batches(config: Config, shape: ModelShape, lengths: Lengths, size: int, ranks: int) -> list[Batch]:
    """Returns a sample of the global batches of `size` pairs, packed into rows for each rank as in training."""
    multiples = row_multiples(config)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(lengths))
    count = min(SAMPLED_BATCHES, max(len(order) // size, 1))
    tokens, entries, visible = lengths.tokens, lengths.entries, lengths.visible(shape)

    def row(pairs: Int64) -> RowSize:
        real = int(tokens[pairs].sum())
        padded = max(-(-real // multiples.tokens), 1) * multiples.tokens
        shared, chosen, rejected = (
            part[pairs] for part in (lengths.shared, lengths.chosen_tail, lengths.rejected_tail)
        )
        segments = segments_of(shared, chosen, rejected, padded - real)
        return RowSize(padded, real, int(entries[pairs].sum()), int(visible[pairs].sum()), segments)

    batches = []
    for start in range(0, count * size, size):
        batch = order[start : start + size]
        most = config.data.longest_row
        plan = plan_rows(tokens[batch], row_length=most, ranks=ranks, rows_multiple=multiples.rows)
        batches.append([[row(batch[np.array(one, dtype=np.int64)]) for one in rank] for rank in plan])
    return batches


def fullest(batches: Sequence[Batch]) -> tuple[RowSize, int]:
    """Returns the row with the most tokens, and the maximum number of rows of a rank in a step."""
    rows = [row for batch in batches for rank in batch for row in rank]
    return max(rows, key=lambda row: row.tokens), max(len(batch[0]) for batch in batches)
