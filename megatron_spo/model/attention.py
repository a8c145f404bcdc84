"""Core attention for rows of prefix-shared pairs.

A row is [shared | chosen tail | rejected tail] per pair, pair after pair. A token sees the earlier tokens of its own
pair, but a rejected tail never sees the chosen one. The pairs of a row are laid side by side as a batch of blocks, so
the work grows with the square of a pair's length, not of the row's. Under context parallelism every rank holds a share
of each pair's tokens and gathers the keys and values of all.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_spo.data.rows import PackedRow
from megatron_spo.runtime.device import to_device

BLOCK = 16
"""Queries and keys of a pair are padded to multiples of this: what torch's kernels sum in vectors of at most so many
is then the same whatever other pairs are in the row, and so is bf16's rounding."""


@dataclass
class RowOnDevice(PackedSeqParams):
    """A packed row as the model takes it; Megatron hands it to every layer of every stage as `packed_seq_params`.

    T tokens and E scored entries (position, target) on this rank, B pairs with at most Q tokens here and L in all.
    Under context parallelism a rank holds its share of the tokens and the entries predicted there.
    """

    tokens: Tensor | None = None  # [1, T]
    positions: Tensor | None = None  # [T] rotary positions
    predict_at: Tensor | None = None  # [E] positions in the row
    targets: Tensor | None = None  # [E] token ids
    entries: Tensor | None = None  # [E] which of the row's entries these are
    queries: Tensor | None = None  # [B, Q] where each token of each pair stands here (0 where there is none)
    keys: Tensor | None = None  # [B, L] where it stands in the keys of all ranks together
    visible: Tensor | None = None  # [B, 1, Q, L] query may see key
    unblock: Tensor | None = None  # [T] where in the flattened blocks a token's output stands
    padding: Tensor | None = None  # [1, T] bool, the tokens that fill up the row
    hidden_states: bool = False  # of the entries, to be returned behind their log-probabilities


def row_to_device(row: PackedRow, device: torch.device, *, rank: int = 0, ranks: int = 1) -> RowOnDevice:
    """Tensors of a row, or of the share of context-parallel rank `rank`, and the geometry of its attention, computed
    once for all layers."""
    length = len(row.tokens)
    owner = _owners(length, ranks)
    here = np.flatnonzero(owner == rank)
    local = np.full(length, -1)
    local[here] = np.arange(len(here))
    entries = np.flatnonzero(local[row.predict_at] >= 0)
    gathered = np.empty(length, dtype=np.int64)
    gathered[np.argsort(owner, kind="stable")] = np.arange(length)
    queries, keys, inside, ends, unblock = _geometry(row.segments, length, here)
    put = partial(to_device, device=device)
    return RowOnDevice(
        qkv_format="sbhd",  # Megatron would reshape "thd" rows itself
        tokens=put(row.tokens[here])[None],
        positions=put(row.positions[here]),
        predict_at=put(local[row.predict_at[entries]]),
        targets=put(row.targets[entries]),
        entries=put(entries),
        queries=put(queries),
        keys=put(gathered[keys]),
        visible=_visible(put(inside), put(ends), keys.shape[1]),
        unblock=put(unblock),
        padding=put(here >= row.real_tokens)[None],
    )


def _owners(length: int, ranks: int) -> np.ndarray:
    """The context-parallel rank of each token [T]: 0 1 1 0 0 1 1 0 ... for two.

    A token costs as much attention as there are tokens before it in its pair; dealt out like this, the ranks have the
    same work and the same number of tokens wherever the pairs of the row begin.
    """
    turn = np.concatenate([np.arange(ranks), np.arange(ranks)[::-1]])
    return np.resize(turn, length)


def _geometry(
    segments: np.ndarray, length: int, here: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Queries [B, Q], keys [B, L] (positions in the whole row), each query's place inside its pair [B, Q], where the
    shared tokens and the chosen tail end there [B, 2], and the way back [T] of a row with these segments [B, 4], for
    the tokens `here` [T].

    Padding behind the last pair reads block position 0: finite numbers that nothing depends on.
    """
    if len(segments) == 0:  # a row without pairs: one block that holds its padding
        segments = np.array([[0, length, 0, 0]])
    start, shared, chosen = segments[:, 0], segments[:, 1], segments[:, 2]
    lengths = segments[:, 1:].sum(1)
    key = np.arange(_in_blocks(int(lengths.max())))
    keys = np.where(key[None] < lengths[:, None], start[:, None] + key[None], 0)
    pair = np.searchsorted(start, here, side="right") - 1
    real = here < start[pair] + lengths[pair]
    local, pair = np.flatnonzero(real), pair[real]
    counts = np.bincount(pair, minlength=len(segments))
    at = np.arange(len(pair)) - np.repeat(np.cumsum(counts) - counts, counts)  # number within the pair, of those here
    most = _in_blocks(max(int(counts.max()), 1))
    queries, inside = np.zeros((2, len(segments), most), dtype=np.int64)
    queries[pair, at], inside[pair, at] = local, here[local] - start[pair]
    unblock = np.zeros(len(here), dtype=np.int64)
    unblock[local] = pair * most + at
    return queries, keys, inside, np.stack([shared, shared + chosen], axis=1), unblock


def _visible(inside: Tensor, ends: Tensor, keys: int) -> Tensor:
    """Which of a pair's `keys` tokens each query sees, bool [B, 1, Q, L]; made on the device, for which it is much to
    transfer. Arguments as `_geometry` returns them."""
    key = torch.arange(keys, device=inside.device)
    in_chosen = (key >= ends[:, :1]) & (key < ends[:, 1:])
    in_rejected = inside >= ends[:, 1:]
    return ((inside[:, :, None] >= key) & ~(in_rejected[:, :, None] & in_chosen[:, None]))[:, None]


def _in_blocks(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


class _GatherOverRanks(torch.autograd.Function):
    """[T, ...] of every rank of a group, one after another; the gradient goes back summed to where it belongs."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = part.new_empty((group.size() * part.shape[0], *part.shape[1:]))
        dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = gradients[0].contiguous()
        part = whole.new_empty((whole.shape[0] // ctx.group.size(), *whole.shape[1:]))
        dist.reduce_scatter_tensor(part, whole, group=ctx.group)
        return part, None


def _kernel_takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> bool:
    """Whether this torch has a kernel for grouped heads with a mask that never holds the scores [B, heads, Q, L]; else
    it would silently take the plain product, which does."""
    arguments = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, False, q.shape[1] != k.shape[1])
    return torch.backends.cuda.can_use_efficient_attention(arguments)


class PairAttention(MegatronModule):
    """Softmax attention within the pairs of a row, by torch's scaled_dot_product_attention."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, attention_type: str, **_: Any
    ) -> None:
        super().__init__(config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: RowOnDevice,
        **_: Any,
    ) -> Tensor:
        """Query [T, 1, heads, d], key and value [T, 1, groups, d], rotated; returns [T, 1, heads * d]."""
        row = packed_seq_params
        assert row.queries is not None and row.keys is not None
        assert row.visible is not None and row.unblock is not None
        if self.config.context_parallel_size > 1:
            both = torch.stack([key, value], dim=-1)
            key, value = _GatherOverRanks.apply(both, parallel_state.get_context_parallel_group()).unbind(-1)
        q, k, v = (
            part[:, 0].index_select(0, blocks.flatten()).view(*blocks.shape, part.shape[2], -1).transpose(1, 2)
            for part, blocks in ((query, row.queries), (key, row.keys), (value, row.keys))
        )
        if q.is_cuda and not _kernel_takes(q, k, v, row.visible):
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=row.visible, enable_gqa=q.shape[1] != k.shape[1])
        flat = out.transpose(1, 2).flatten(0, 1).flatten(1)
        return flat.index_select(0, row.unblock)[:, None]
