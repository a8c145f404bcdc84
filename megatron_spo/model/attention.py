"""Core attention for rows of prefix-shared pairs.

A row holds [shared | chosen tail | rejected tail] for one pair after another. A token sees the earlier tokens of its
own pair, but a rejected tail never sees the chosen tail. The row is divided into segments of queries and their keys
(model/segments.py), which a GPU kernel for variable lengths takes directly. Without such a kernel, and under context
parallelism, segments of similar size are batched and their queries are processed in strips, each over the keys it can
see, so that only about half of the scores are computed. Under context parallelism every rank holds a part of each
pair's tokens and gathers the keys and values of all.
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
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.data.rows import PackedRow
from megatron_spo.model.kernels import Varlen, varlen_kernel
from megatron_spo.model.segments import Blocks, Segments, blocks_of, key_order, places, segments_of
from megatron_spo.runtime.device import to_device

BLOCK = 16
"""Queries and keys of a segment are padded to multiples of this. torch's kernels sum in vectors of at most this length,
so the sums, and the rounding in bf16, do not depend on the other pairs in the row."""
GPU_BLOCK = 128
"""The same on a GPU without a kernel for variable lengths; larger, for fewer kernel launches."""
STRIP = 64
"""Queries per strip on a CPU, whose kernel also computes masked scores; a multiple of BLOCK."""

SCORES_PER_CHUNK = 2**24
"""Number of scores of capped attention that a rank holds at a time (64 MiB in fp32, in several copies)."""


@dataclass
class RowOnDevice(PackedSeqParams):
    """A packed row as the model's input; Megatron passes it to every layer of every stage as `packed_seq_params`.

    It has T tokens and E scored entries (position, target) on this rank. Under context parallelism a rank holds its
    share of the tokens and the entries that they predict.
    """

    tokens: Tensor | None = None  # [1, T]
    positions: Tensor | None = None  # [T] rotary positions
    predict_at: Tensor | None = None  # [E] positions in the row
    targets: Tensor | None = None  # [E] token ids
    entries: Tensor | None = None  # [E] indices of these entries among the row's
    padding: Tensor | None = None  # [1, T] bool, true for padding tokens
    geometry: "Geometry | None" = None
    exchanged: int = 0
    """Number of tokens that pipeline stages exchange for each row of a pass, at least T."""


def row_to_device(
    row: PackedRow, device: torch.device, *, rank: int = 0, ranks: int = 1, longest: int = 0
) -> RowOnDevice:
    """Copies a row, or the share of context-parallel rank `rank` of `ranks`, to `device` and computes the geometry of
    its attention once for all layers. `longest`: length of the longest row of the pass, if this is not the only one."""
    length = len(row.tokens)
    owner = _owners(length, ranks)
    here = np.flatnonzero(owner == rank)
    local = np.full(length, -1)
    local[here] = np.arange(len(here))
    entries = np.flatnonzero(local[row.predict_at] >= 0)
    gathered = np.empty(length, dtype=np.int64)
    gathered[np.argsort(owner, kind="stable")] = np.arange(length)
    put = partial(to_device, device=device)
    return RowOnDevice(
        qkv_format="sbhd",  # with "thd" Megatron would reshape the rows
        tokens=put(row.tokens[here])[None],
        positions=put(row.positions[here]),
        predict_at=put(local[row.predict_at[entries]]),
        targets=put(row.targets[entries]),
        entries=put(entries),
        padding=put(here >= row.real_tokens)[None],
        geometry=Geometry(segments_of(row.segments, length, here), here, gathered, device),
        exchanged=max(longest, length) // ranks,
    )


def _owners(length: int, ranks: int) -> np.ndarray:
    """Returns the context-parallel rank of each token [T]: 0 1 1 0 0 1 1 0 ... for two ranks.

    The attention cost of a token grows with the number of tokens before it in its pair. With this order the ranks have
    equal work and equally many tokens, wherever the pairs of the row begin.
    """
    turn = np.concatenate([np.arange(ranks), np.arange(ranks)[::-1]])
    return np.resize(turn, length)


class _GatherOverRanks(torch.autograd.Function):
    """Concatenates [T, ...] of all ranks of a group; the backward pass sums the gradients and returns each rank its
    part."""

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


@dataclass(frozen=True)
class ScoreRule:
    """How scores are made from products of queries and keys: times `scale`, then softcap * tanh(x / softcap) if set."""

    scale: float
    softcap: float | None = None

    def heads_repeat(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> bool:
        """Returns whether the kernel needs the keys and values of a group repeated for each of its heads."""
        return self.softcap is not None or (q.is_cuda and not _kernel_takes(q, k, v, bias))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Returns attention [B, heads, Q, d] of q over k and v [B, groups, K, d]; bias [B, 1, Q, K] is added."""
        if self.softcap is not None:
            return self._capped(q, k, v, bias, self.softcap)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped, scale=self.scale)

    def _capped(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, softcap: float) -> Tensor:
        """Attention with capped scores, which no kernel of torch supports. Queries are processed in chunks whose scores
        are recomputed in the backward pass, so that [Q, K] scores of all heads are never held at once."""

        def chunk(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            scores = ((q @ k.mT).float() * (self.scale / softcap)).tanh() * softcap
            return (scores + bias).softmax(-1).to(v.dtype) @ v

        size = max(BLOCK, SCORES_PER_CHUNK // (q.shape[0] * q.shape[1] * k.shape[2]))
        again = partial(checkpoint, chunk, use_reentrant=False, preserve_rng_state=False)
        parts = zip(q.split(size, dim=2), bias.split(size, dim=2), strict=True)
        return torch.cat([again(part, k, v, seen) for part, seen in parts], dim=2)


@dataclass(frozen=True)
class Tiles:
    """A batch of B segments of similar size, padded to Q queries and K keys.

    bias     [B, 1, Q, K] 0 where a query sees a key, else -inf
    reaches  start and end of the keys that the queries of each strip can see
    """

    bias: Tensor
    strip: int
    reaches: list[tuple[int, int]]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scores: ScoreRule) -> Tensor:
        """Returns attention [B * Q, heads * d] of q [B * Q, heads, d] over k and v [B * K, groups, d]."""
        count, _, _, _ = self.bias.shape
        q, k, v = (part.view(count, -1, *part.shape[1:]).transpose(1, 2) for part in (q, k, v))
        if scores.heads_repeat(q, k, v, self.bias):
            k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
        strips = []
        for i, reach in enumerate(self.reaches):
            here, keys = slice(i * self.strip, (i + 1) * self.strip), slice(*reach)
            out = scores.attend(q[:, :, here], k[:, :, keys], v[:, :, keys], self.bias[:, :, here, keys])
            strips.append(out.transpose(1, 2))
        return torch.cat(strips, dim=1).flatten(2).flatten(0, 1)


@dataclass(frozen=True)
class Tiling:
    """A row divided into tiles: the token of each of their queries [NQ] and keys [NK], and the position of each token's
    output among the queries [T]."""

    queries: Tensor
    keys: Tensor
    unblock: Tensor
    tiles: list[Tiles]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scores: ScoreRule) -> Tensor:
        """Returns attention [T, heads * d] of query [T, heads, d] over key and value [T of all ranks, groups, d]."""
        q, k, v = query.index_select(0, self.queries), key.index_select(0, self.keys), value.index_select(0, self.keys)
        sizes = [tile.bias.shape for tile in self.tiles]
        q_parts = q.split([size[0] * size[2] for size in sizes])
        k_parts, v_parts = (part.split([size[0] * size[3] for size in sizes]) for part in (k, v))
        parts = zip(self.tiles, q_parts, k_parts, v_parts, strict=True)
        outs = [tiles.attend(q, k, v, scores) for tiles, q, k, v in parts]
        return torch.cat(outs).index_select(0, self.unblock)


class Geometry:
    """Which tokens of a row attend to which, in the form a backend needs; the first layer creates it for all layers."""

    def __init__(
        self, segments: Segments, here: NDArray[np.int64], gathered: NDArray[np.int64], device: torch.device
    ) -> None:
        """`here`: row positions of this rank's tokens. `gathered`: index of each row position among the gathered
        keys."""
        self._segments, self._here, self._gathered, self._device = segments, here, gathered, device
        self._tilings: dict[int | None, Tiling] = {}
        self._varlen: Varlen | None = None

    def narrows(self, window: int | None) -> bool:
        """Returns whether a window of `window` keys hides any key from any query of the row."""
        return window is not None and int(self._segments.keys.max()) > window

    def tiling(self, dtype: torch.dtype, window: int | None) -> Tiling:
        """Returns the tiles for a kernel with a mask."""
        window = window if self.narrows(window) else None
        if window not in self._tilings:
            multiple = BLOCK if self._device.type == "cpu" else GPU_BLOCK
            blocks, put = (
                blocks_of(self._segments, self._here, multiple=multiple),
                partial(to_device, device=self._device),
            )
            self._tilings[window] = Tiling(
                put(np.concatenate([block.queries.ravel() for block in blocks])),
                put(self._gathered[np.concatenate([block.keys.ravel() for block in blocks])]),
                put(places(self._segments, blocks)),
                [self._tiles(block, dtype, window, multiple) for block in blocks],
            )
        return self._tilings[window]

    def _tiles(self, block: Blocks, dtype: torch.dtype, window: int | None, multiple: int) -> Tiles:
        most, keys = block.queries.shape[1], block.keys.shape[1]
        strip = STRIP if self._device.type == "cpu" else most
        begins = np.arange(0, most, strip)
        last = np.maximum.reduceat(block.at.max(0), begins) + 1
        first = np.zeros_like(last) if window is None else np.minimum.reduceat(block.at.min(0), begins) - window + 1
        key = torch.arange(keys, device=self._device)
        at = to_device(block.at, self._device)[:, None, :, None]
        sees = key <= at if window is None else (key <= at) & (key > at - window)
        bias = torch.zeros(sees.shape, dtype=dtype, device=self._device).masked_fill_(~sees, -torch.inf)
        bounds = np.maximum(first, 0) // multiple * multiple, -(-last // multiple) * multiple
        return Tiles(bias, strip, list(zip(*(bound.tolist() for bound in bounds), strict=True)))

    def varlen(self) -> Varlen:
        """Returns the segments for a kernel for variable lengths; not available under context parallelism."""
        if self._varlen is None:
            put = partial(to_device, device=self._device)
            segments = self._segments
            self._varlen = Varlen(
                put(key_order(segments)),
                put(_bounds(segments.queries)),
                put(_bounds(segments.keys)),
                int(segments.queries.max()),
                int(segments.keys.max()),
            )
        return self._varlen


def _bounds(lengths: NDArray[np.int64]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _kernel_takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> bool:
    """Returns whether this torch has a kernel for grouped heads with a mask that never holds the scores
    [B, heads, Q, K]. Otherwise torch would silently use the plain product, which holds them."""
    arguments = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, False, q.shape[1] != k.shape[1])
    return torch.backends.cuda.can_use_efficient_attention(arguments)


class PairAttention(MegatronModule):
    """Softmax attention within the pairs of a row."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        shape: ModelShape,
        **_: Any,
    ) -> None:
        super().__init__(config)
        plain = shape.head_dim**-0.5
        self._window = shape.sliding_window if layer_number - 1 in shape.sliding_layers else None
        self._scores = (
            ScoreRule(shape.gemma.attention_scale, shape.gemma.attention_softcap) if shape.gemma else ScoreRule(plain)
        )
        self._is_plain = self._scores == ScoreRule(plain)

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
        """Returns attention [T, 1, heads * d] of query [T, 1, heads, d] over key and value [T, 1, groups, d], all with
        rotary embedding applied."""
        geometry = packed_seq_params.geometry
        assert geometry is not None
        kernel = None
        if self.config.context_parallel_size > 1:
            both = torch.stack([key, value], dim=-1)
            key, value = _GatherOverRanks.apply(both, parallel_state.get_context_parallel_group()).unbind(-1)
        elif self._is_plain and not geometry.narrows(self._window):
            kernel = varlen_kernel(query.device.type, query.dtype)
        q, k, v = query[:, 0], key[:, 0], value[:, 0]
        if kernel is None:
            return geometry.tiling(q.dtype, self._window).attend(q, k, v, self._scores)[:, None]
        return geometry.varlen().attend(kernel, q, k, v)[:, None]
