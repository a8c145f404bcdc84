"""Packs pairs into rows, the only batch format.

A row is `[shared | chosen tail | rejected tail]` for one pair after another. `shared` is the longest common
prefix of (prompt + chosen) and (prompt + rejected); rotary positions of the rejected tail restart at
`shared`, and the last shared token predicts the first token of both tails. Attention inside a pair is:
chosen tail sees shared + itself, rejected tail sees shared + itself, nothing sees another pair
(docs/how_it_works.md#prefix-sharing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """One tokenised row of a data set.

    Attributes:
        chosen_ids, rejected_ids: int32 [P+C] and [P+R], prompt and response. `rejected_ids` is empty for an SFT row.
        prompt_length: P >= 1, number of prompt tokens.
        shared: length of the longest common prefix (>= P); P+C for an SFT row.
    """

    chosen_ids: NDArray[np.int32]
    rejected_ids: NDArray[np.int32]
    prompt_length: int
    shared: int


@dataclass(frozen=True)
class PackedRow:
    """One row of prefix-shared pairs as NumPy arrays: T tokens, n pairs, E scored entries, K uses of entries.

    Attributes:
        tokens, positions: int64 [T], token ids and rotary positions; positions of the padding start at 0.
        segments: int64 [n, 4], (start, shared, chosen tail, rejected tail) of each pair.
        predict_at, targets: int64 [E]; the logits at position predict_at[e] of the row score token targets[e]. A
            response token that both responses share is one entry.
        score_index: int64 [K], entries in the order chosen_0, rejected_0, chosen_1, ...
        score_lengths: int64 [2n], number of entries of each of these responses; 0 if there is no rejected response.
        pairs: int64 [n], data set indices.
        chosen_tokens, rejected_tokens: int64 [n], scored tokens: score_lengths[0::2] and score_lengths[1::2].
        real_tokens: number of tokens without padding.
    """

    tokens: Int64
    positions: Int64
    segments: Int64
    predict_at: Int64
    targets: Int64
    score_index: Int64
    score_lengths: Int64
    pairs: Int64
    chosen_tokens: Int64
    rejected_tokens: Int64
    real_tokens: int


@dataclass(frozen=True)
class _Piece:
    """One pair of a row, with indices relative to its first token and first entry."""

    tokens: Int64
    positions: Int64
    predict_at: Int64
    targets: Int64
    chosen_index: Int64
    rejected_index: Int64
    segment: tuple[int, int, int]


def _piece(example: Example) -> _Piece:
    chosen, rejected = example.chosen_ids.astype(np.int64), example.rejected_ids.astype(np.int64)
    prompt, shared = example.prompt_length, example.shared
    chosen_tail = len(chosen) - shared
    rejected_tail = max(len(rejected) - shared, 0)
    common = shared - prompt  # response tokens that both responses share
    # Position before each target. The rejected tail follows the chosen tail, but the last shared token predicts its
    # first token.
    rejected_at = shared + chosen_tail - 1 + np.arange(rejected_tail)
    rejected_at[:1] = shared - 1
    scored_chosen = common + chosen_tail
    chosen_index = np.arange(scored_chosen)
    rejected_index = np.concatenate([np.arange(common), scored_chosen + np.arange(rejected_tail)])
    return _Piece(
        tokens=np.concatenate([chosen, rejected[shared:]]),
        positions=np.concatenate([np.arange(len(chosen)), shared + np.arange(rejected_tail)]),
        predict_at=np.concatenate([prompt - 1 + np.arange(scored_chosen), rejected_at]),
        targets=np.concatenate([chosen[prompt:], rejected[shared:]]),
        chosen_index=chosen_index,
        rejected_index=rejected_index if len(rejected) else rejected_index[:0],
        segment=(shared, chosen_tail, rejected_tail),
    )


def build_row(examples: Sequence[tuple[int, Example]], *, multiple: int, pad_id: int = 0) -> PackedRow:
    """Packs (data set index, example) pairs into one row whose length is a multiple of `multiple`.

    Without examples, the row has `multiple` padding tokens and no entries, so that every rank can run the same number
    of rows.
    """
    pieces = [_piece(example) for _, example in examples]
    lengths = np.array([len(piece.tokens) for piece in pieces], dtype=np.int64)
    entries = np.array([len(piece.targets) for piece in pieces], dtype=np.int64)
    starts, firsts = np.cumsum(lengths) - lengths, np.cumsum(entries) - entries
    real = int(lengths.sum())
    padding = max(-(-real // multiple), 1) * multiple - real
    scores = [
        first + index
        for first, piece in zip(firsts, pieces, strict=True)
        for index in (piece.chosen_index, piece.rejected_index)
    ]
    score_lengths = np.array([len(score) for score in scores], dtype=np.int64)
    segments = [(start, *piece.segment) for start, piece in zip(starts, pieces, strict=True)]
    return PackedRow(
        tokens=_join([piece.tokens for piece in pieces] + [np.full(padding, pad_id)]),
        positions=_join([piece.positions for piece in pieces] + [np.arange(padding)]),
        segments=np.array(segments, dtype=np.int64).reshape(-1, 4),
        predict_at=_join([start + piece.predict_at for start, piece in zip(starts, pieces, strict=True)]),
        targets=_join([piece.targets for piece in pieces]),
        score_index=_join(scores),
        score_lengths=score_lengths,
        pairs=np.array([index for index, _ in examples], dtype=np.int64),
        chosen_tokens=score_lengths[0::2],
        rejected_tokens=score_lengths[1::2],
        real_tokens=real,
    )


def _join(arrays: Sequence[NDArray[np.integer]]) -> Int64:
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays]).astype(np.int64, copy=False)
