"""Assigns pairs to batches and to rows. All functions depend only on data, seed, epoch and batch size."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_spo.errors import UserError

Int64 = NDArray[np.int64]

ATTENTION_SCALE = 4e-5
"""Attention cost per squared token, relative to the cost of linear layers per token: about 1 / (6 * hidden) for hidden
4096."""


@dataclass(frozen=True)
class Stream:
    """One of the training sets of a run.

    Attributes:
        number: makes the orders of the sets independent for the same seed.
        data_key: configuration key of the set, for messages.
    """

    number: int
    data_key: str


PAIRS = Stream(0, "data.train")
SFT = Stream(1, "spo.sft_data")


def rows_per_epoch(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Returns the number of rows of each source in one epoch: round(weight * size)."""
    return [round(weight * size) for size, weight in zip(sizes, weights, strict=True)]


def batches_per_epoch(
    sizes: Sequence[int],
    weights: Sequence[float],
    *,
    global_batch_size: int,
    stream: Stream = PAIRS,
) -> int:
    """Returns the number of batches in one epoch; the last one may be smaller.

    Raises:
        UserError: an epoch has no rows.
    """
    rows = sum(rows_per_epoch(sizes, weights))
    if rows == 0:
        raise UserError(
            f"{stream.data_key}: an epoch has no rows (sources of {list(sizes)} rows, weights {list(weights)}); "
            "set larger weights"
        )
    return -(-rows // global_batch_size)


def epoch_order(
    sizes: Sequence[int],
    weights: Sequence[float],
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    stream: Stream = PAIRS,
) -> Int64:
    """Returns the data set indices [rows of the epoch] of epoch `epoch`, in order.

    Sources follow one another in the data set. With weight w, every row is used floor(w) times, and a random subset,
    drawn again for each epoch, once more. Without `shuffle` the order is that of the files.
    """
    generator = np.random.Generator(
        np.random.PCG64(np.random.SeedSequence([seed, epoch, *([stream.number] if stream.number else [])]))
    )
    starts = np.cumsum([0, *sizes])
    parts = []
    for size, start, rows in zip(sizes, starts, rows_per_epoch(sizes, weights), strict=False):
        if size == 0:
            continue
        whole, rest = divmod(rows, size)
        some = np.sort(generator.permutation(size)[:rest]) if rest else np.zeros(0, dtype=np.int64)
        parts.append(start + np.concatenate([np.tile(np.arange(size), whole), some]))
    order = np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64)
    return generator.permutation(order) if shuffle else order


class Sampler:
    """Returns the indices of any step. It has no state to save, because step k depends only on k."""

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        seed: int,
        global_batch_size: int,
        shuffle: bool = True,
        stream: Stream = PAIRS,
    ) -> None:
        self.steps_per_epoch = batches_per_epoch(sizes, weights, global_batch_size=global_batch_size, stream=stream)
        self._order_of = partial(epoch_order, tuple(sizes), tuple(weights), seed=seed, shuffle=shuffle, stream=stream)
        self._size = global_batch_size
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def indices_of_step(self, step: int) -> Int64:
        """Returns the data set indices of the global batch of `step`, counted from 0 over all epochs.

        The order of one epoch is cached.
        """
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = self._order_of(epoch=epoch)
            self._epoch = epoch
        return self._order[batch * self._size : (batch + 1) * self._size]


def pair_costs(tokens: ArrayLike, *, attention_scale: float = ATTENTION_SCALE) -> NDArray[np.float64]:
    """Returns the relative cost of pairs with the given numbers of packed tokens: linear layers plus attention."""
    count = np.asarray(tokens, dtype=np.float64)
    return count * (1.0 + attention_scale * count)


def plan_rows(
    tokens: ArrayLike, costs: ArrayLike | None = None, *, row_length: int, ranks: int, rows_multiple: int = 1
) -> list[list[list[int]]]:
    """Distributes a batch over ranks and rows; result[rank][row] is a list of positions in the batch.

    Every rank gets the same number of rows: the smallest multiple of `rows_multiple` that best-fit-decreasing packing
    allows. A row has at most `row_length` tokens and may be empty. Costs are balanced over the ranks, and over the rows
    of a rank if there is free space.

    Args:
        tokens: [B], packed tokens of each pair.
        costs: [B], relative time of each pair; None: `pair_costs`.
        row_length: maximum tokens of a row.
        ranks: number of ranks.
        rows_multiple: number that must divide the rows of a rank.
    """
    sizes = np.asarray(tokens, dtype=np.int64).tolist()
    weights = (pair_costs(sizes) if costs is None else np.asarray(costs, dtype=np.float64)).tolist()
    if sizes and max(sizes) > row_length:
        raise ValueError(f"a pair of {max(sizes)} tokens does not fit into a row of {row_length}")
    packed = _best_fit(range(len(sizes)), sizes, row_length)
    rows = max(-(-len(packed) // (ranks * rows_multiple)), 1) * rows_multiple
    by_cost = _longest_first(range(len(sizes)), weights, ranks)
    plan = [_even_rows(group, sizes, weights, rows, row_length) for group in by_cost]
    if max(len(part) for part in plan) > rows:  # balancing pairs needs another row: balance whole rows instead
        totals = [sum(weights[i] for i in row) for row in packed]
        plan = [[packed[i] for i in group] for group in _longest_first(range(len(packed)), totals, ranks, most=rows)]
    return [part + [[] for _ in range(rows - len(part))] for part in plan]


def _even_rows(
    items: Sequence[int], sizes: Sequence[int], costs: Sequence[float], rows: int, capacity: int
) -> list[list[int]]:
    """Assigns the most expensive item first, each to the cheapest row with enough space; falls back to best fit if an
    item does not fit into any row."""
    result: list[list[int]] = [[] for _ in range(rows)]
    heap = [(0.0, capacity, row) for row in range(rows)]
    for item in sorted(items, key=lambda i: (-costs[i], i)):
        full = []
        while heap and heap[0][1] < sizes[item]:
            full.append(heapq.heappop(heap))
        if not heap:
            return _best_fit(items, sizes, capacity)
        cost, room, row = heapq.heappop(heap)
        result[row].append(item)
        for entry in [*full, (cost + costs[item], room - sizes[item], row)]:
            heapq.heappush(heap, entry)
    return result


def _best_fit(items: Sequence[int] | range, sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: assigns the largest item first, each to the fullest row with enough space."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), sorted
    for item in sorted(items, key=lambda i: (-sizes[i], i)):
        at = bisect.bisect_left(free, (sizes[item], -1))
        room, row = free.pop(at) if at < len(free) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        bisect.insort(free, (room - sizes[item], row))
    return rows


def _longest_first(
    items: Sequence[int] | range, costs: Sequence[float], groups: int, *, most: int | None = None
) -> list[list[int]]:
    """Assigns the most expensive item first, each to the cheapest group (with fewer than `most` items)."""
    result: list[list[int]] = [[] for _ in range(groups)]
    heap = [(0.0, group) for group in range(groups)]
    for item in sorted(items, key=lambda i: (-costs[i], i)):
        total, group = heapq.heappop(heap)
        result[group].append(item)
        if most is None or len(result[group]) < most:
            heapq.heappush(heap, (total + costs[item], group))
    return result
