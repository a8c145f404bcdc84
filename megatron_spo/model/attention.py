"""Core attention for rows of prefix-shared pairs.

A row is [shared | chosen tail | rejected tail] per pair, pair after pair. A token sees the earlier tokens of its own
pair, but a rejected tail never sees the chosen one. The pairs of a row are laid side by side as a batch of blocks, so
the work grows with the square of a pair's length, not of the row's.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_spo.data.rows import PackedRow


@dataclass
class RowOnDevice(PackedSeqParams):
    """A packed row as the model takes it; Megatron hands it to every layer of every stage as `packed_seq_params`.

    T tokens, E scored entries (position, target), B pairs, L tokens of the longest pair.
    """

    tokens: Tensor | None = None  # [1, T]
    positions: Tensor | None = None  # [T] rotary positions
    predict_at: Tensor | None = None  # [E] positions in the row
    targets: Tensor | None = None  # [E] token ids
    blocks: Tensor | None = None  # [B, L] position in the row of each token of each pair (0 where there is none)
    visible: Tensor | None = None  # [B, 1, L, L] query may see key
    unblock: Tensor | None = None  # [T] where in the flattened blocks a token's output stands


def row_to_device(row: PackedRow, device: torch.device) -> RowOnDevice:
    """Tensors of a row, and the geometry of its attention, computed once for all layers."""
    blocks, visible, unblock = _geometry(row.segments, len(row.tokens))
    put = lambda array: torch.from_numpy(array).to(device, non_blocking=True)  # noqa: E731
    return RowOnDevice(
        qkv_format="sbhd",  # Megatron would reshape "thd" rows itself
        tokens=put(row.tokens)[None],
        positions=put(row.positions),
        predict_at=put(row.predict_at),
        targets=put(row.targets),
        blocks=put(blocks),
        visible=put(visible),
        unblock=put(unblock),
    )


def _geometry(segments: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks [B, L], visibility [B, 1, L, L] and the way back [T] of a row with these segments [B, 4].

    Padding behind the last pair reads block position 0: finite numbers that nothing depends on.
    """
    if len(segments) == 0:  # a row without pairs: one block that holds its padding
        segments = np.array([[0, length, 0, 0]])
    start, shared, chosen = segments[:, 0], segments[:, 1], segments[:, 2]
    lengths = segments[:, 1:].sum(1)
    longest = int(lengths.max())
    at = np.arange(longest)
    real = at[None] < lengths[:, None]
    blocks = np.where(real, start[:, None] + at[None], 0)
    in_chosen = (at[None] >= shared[:, None]) & (at[None] < (shared + chosen)[:, None])
    in_rejected = at[None] >= (shared + chosen)[:, None]
    visible = (at[:, None] >= at[None])[None] & ~(in_rejected[:, :, None] & in_chosen[:, None, :])
    unblock = np.zeros(length, dtype=np.int64)
    pair, token = np.nonzero(real)
    unblock[blocks[pair, token]] = pair * longest + token
    return blocks, visible[:, None], unblock


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
        assert row.blocks is not None and row.visible is not None and row.unblock is not None
        pairs, length = row.blocks.shape
        index = row.blocks.flatten()
        q, k, v = (
            part[:, 0].index_select(0, index).view(pairs, length, part.shape[2], -1).transpose(1, 2)
            for part in (query, key, value)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=row.visible, enable_gqa=q.shape[1] != k.shape[1])
        flat = out.transpose(1, 2).reshape(pairs * length, -1)
        return flat.index_select(0, row.unblock)[:, None]
