"""Divides a row of prefix-shared pairs into attention segments; pure numpy functions.

A pair [shared | chosen tail | rejected tail] has two segments: the queries [shared | chosen tail] over the same keys,
and the queries [rejected tail] over the keys [shared | rejected tail]. In both, the last query sees all keys and each
earlier one sees one key less (causal, aligned at the end). The row's padding is a separate segment, so that each token
is a query exactly once. Segments are in the order of the row.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """S segments with at least one query on this rank; all arrays are int64 [S].

    The keys of a segment are the row positions from `prefix_start` to `prefix_start + prefix`, then from `start` to
    `start + length` (exclusive). Its queries on this rank are the local tokens from `first` to `first + queries`.
    """

    prefix_start: Int64
    prefix: Int64
    start: Int64
    length: Int64
    first: Int64
    queries: Int64

    @property
    def keys(self) -> Int64:
        """Number of keys of each segment."""
        return self.prefix + self.length


@dataclass(frozen=True)
class Blocks:
    """A batch of B segments of similar size, padded to Q queries and K keys.

    queries, at  int64 [B, Q]  local token of each query, and its index among its segment's keys
    keys         int64 [B, K]  row position of each key
    Padding repeats the last token of its segment; no real query sees a padded key.
    """

    members: Int64
    queries: Int64
    at: Int64
    keys: Int64


def segments_of(pairs: Int64, length: int, here: Int64) -> Segments:
    """Returns the segments of a row of `length` tokens with `pairs` [n, 4] (start, shared, chosen tail, rejected tail);
    the tokens `here` (ascending row positions) are on this rank."""
    start, shared, chosen, rejected = pairs.T
    split = start + shared + chosen
    end = int((split + rejected).max(initial=0))
    zero = np.zeros_like(start)
    table = np.stack([start, zero, start, shared + chosen, start, shared, split, rejected], axis=1).reshape(-1, 4)
    table = np.concatenate([table, [[end, 0, end, length - end]]]).astype(np.int64)
    prefix_start, prefix, begin, size = table.T
    first = np.searchsorted(here, begin)
    queries = np.searchsorted(here, begin + size) - first
    return Segments(*(column[queries > 0] for column in (prefix_start, prefix, begin, size, first, queries)))


def blocks_of(segments: Segments, here: Int64, *, multiple: int) -> list[Blocks]:
    """Returns batches of the segments that have equally many queries and keys after padding to multiples of
    `multiple`."""
    sizes = -(-np.stack([segments.queries, segments.keys], axis=1) // multiple) * multiple
    kinds, kind_of = np.unique(sizes, axis=0, return_inverse=True)
    return [
        _side_by_side(segments, here, np.flatnonzero(kind_of.ravel() == i), int(most_q), int(most_k))
        for i, (most_q, most_k) in enumerate(kinds)
    ]


def _side_by_side(segments: Segments, here: Int64, members: Int64, most_queries: int, most_keys: int) -> Blocks:
    prefix_start, prefix, start, first, queries, keys = (
        column[members, None]
        for column in (
            segments.prefix_start, segments.prefix, segments.start, segments.first, segments.queries, segments.keys,
        )
    )  # fmt: skip
    local = first + np.minimum(np.arange(most_queries), queries - 1)
    key = np.minimum(np.arange(most_keys), keys - 1)
    return Blocks(
        members,
        queries=local,
        at=prefix + here[local] - start,
        keys=np.where(key < prefix, prefix_start + key, start + key - prefix),
    )


def places(segments: Segments, blocks: list[Blocks]) -> Int64:
    """Returns the index of each local token [T] among the flattened queries of all blocks, in order."""
    found = np.empty(int(segments.queries.sum()), dtype=np.int64)
    before = 0
    for block in blocks:
        width = block.queries.shape[1]
        real = np.arange(width) < segments.queries[block.members, None]
        found[block.queries[real]] = before + np.flatnonzero(real)
        before += block.queries.size
    return found


def key_order(segments: Segments) -> Int64:
    """Returns the row position of each key, segment by segment, without padding."""
    total, starts = int(segments.keys.sum()), np.cumsum(segments.keys) - segments.keys
    number = np.arange(total) - np.repeat(starts, segments.keys)
    prefix = np.repeat(segments.prefix, segments.keys)
    prefix_start, start = np.repeat(segments.prefix_start, segments.keys), np.repeat(segments.start, segments.keys)
    return np.where(number < prefix, prefix_start + number, start + number - prefix)
