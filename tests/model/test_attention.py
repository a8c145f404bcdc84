"""Compares attention of packed rows, for every backend, with plain attention computed query by query."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_spo.data.rows import PackedRow
from megatron_spo.model import kernels
from megatron_spo.model.attention import Geometry, RowOnDevice, ScoreRule, row_to_device
from tests.data.test_rows import visible
from tests.support.megatron import example, row_of

HEADS, GROUPS, WIDTH = 4, 2, 8
CPU = torch.device("cpu")


def row(*sizes: tuple[int, int, int], multiple: int = 1) -> PackedRow:
    """Returns a row of pairs with these numbers of prompt, chosen and rejected tokens (0 rejected: an SFT row)."""
    return row_of([example(range(p), range(100, 100 + c), range(500, 500 + r)) for p, c, r in sizes], multiple=multiple)


ROWS = {
    "pairs": row((5, 3, 7), (70, 40, 90), (1, 1, 1), (5, 4, 6), multiple=8),
    "strips": row((10, 150, 200), (90, 60, 120)),
    "sft": row((5, 9, 0), (3, 80, 0), multiple=16),
    "one with its padding": row((3, 2, 2), multiple=64),
    "no pairs": row(multiple=12),
}


def plain(q: Tensor, k: Tensor, v: Tensor, one: PackedRow, window: int | None = None, cap: float = torch.inf) -> Tensor:
    """Returns attention [T, heads * d] of q [T, heads, d], k and v [T, groups, d]; padding sees the padding before
    it."""
    out = []
    for at in range(len(one.tokens)):
        seen = visible(one, at) if at < one.real_tokens else list(range(one.real_tokens, at + 1))
        seen = seen if window is None else seen[-window:]
        keys, values = (part[seen].repeat_interleave(HEADS // GROUPS, dim=1) for part in (k, v))
        scores = torch.einsum("hd,khd->hk", q[at], keys) / WIDTH**0.5
        weights = (scores if cap == torch.inf else cap * (scores / cap).tanh()).softmax(-1)
        out.append(torch.einsum("hk,khd->hd", weights, values).flatten())
    return torch.stack(out)


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = [(length, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return q, k, v


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, bounds_q: Tensor, bounds_k: Tensor, most_q: int, most_k: int
) -> Tensor:
    """Computes what a kernel for variable lengths does: segment by segment, causal, aligned at the end of the keys."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32
    assert most_q == bounds_q.diff().max() and most_k == bounds_k.diff().max()
    out = []
    for (a, b), (c, d) in zip(bounds_q.unfold(0, 2, 1).tolist(), bounds_k.unfold(0, 2, 1).tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", query[a:b], key[c:d]) / WIDTH**0.5
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - b + a)
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value[c:d]))
    return torch.cat(out)


def by_flag(q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
            is_causal: bool = False) -> Tensor:  # fmt: skip
    """Signature of torch 2.10: keys have as many heads as queries."""
    assert is_causal and q.shape[1] == k.shape[1]
    return one_by_one(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k)


def by_window(q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
              window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
              num_splits: int | None = None) -> Tensor:  # fmt: skip
    """Signature of torch 2.13."""
    assert window_size == (-1, 0) and num_splits == 1 and enable_gqa and (q.shape[1], k.shape[1]) == (HEADS, GROUPS)
    k, v = (part.repeat_interleave(HEADS // GROUPS, dim=1) for part in (k, v))
    return one_by_one(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k)


def geometry(on_device: RowOnDevice) -> Geometry:
    assert on_device.geometry is not None
    return on_device.geometry


def tiled(on_device: RowOnDevice, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return geometry(on_device).tiling(q.dtype, None).attend(q, k, v, ScoreRule(WIDTH**-0.5))


def varlen(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda on_device, q, k, v: on_device.geometry.varlen().attend(kernels.of_torch(function), q, k, v)


BACKENDS = {"tiles": tiled, "causal flag": varlen(by_flag), "window": varlen(by_window)}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_those_of_plain_attention(backend: str, name: str) -> None:
    one = ROWS[name]
    q, k, v = inputs(len(one.tokens))
    expected = plain(q, k, v, one)
    weights = torch.randn_like(expected)
    found = BACKENDS[backend](row_to_device(one, CPU), q, k, v)
    assert torch.allclose(found, expected, atol=1e-10)
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, k, v), weights), torch.autograd.grad(expected, (q, k, v), weights), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("window", "cap"), [(1, None), (7, None), (70, None), (None, 2.0), (33, 2.0), (400, None)])
def test_windows_and_caps_are_those_of_plain_attention(name: str, window: int | None, cap: float | None) -> None:
    one = ROWS[name]
    q, k, v = inputs(len(one.tokens))
    expected = plain(q, k, v, one, window, cap or torch.inf)
    tiling = geometry(row_to_device(one, CPU)).tiling(q.dtype, window)
    found = tiling.attend(q, k, v, ScoreRule(WIDTH**-0.5, cap))
    weights = torch.randn_like(expected)
    for ours, theirs in zip(
        (found, *torch.autograd.grad(found, (q, k, v), weights)),
        (expected, *torch.autograd.grad(expected, (q, k, v), weights)),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-10 if cap is None else 1e-5)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=3),
    st.sampled_from([1, 2, 3]),
)
@settings(deadline=None, max_examples=20)
def test_ranks_of_a_context_parallel_group_make_the_row(sizes: list[tuple[int, int, int]], ranks: int) -> None:
    one = row(*sizes, multiple=2 * ranks)
    q, k, v = (part.detach() for part in inputs(len(one.tokens)))
    turn = np.resize(np.concatenate([np.arange(ranks), np.arange(ranks)[::-1]]), len(one.tokens))
    order = np.argsort(turn, kind="stable")
    expected = plain(q, k, v, one)
    for rank in range(ranks):
        here = np.flatnonzero(turn == rank)
        on_device = row_to_device(one, CPU, rank=rank, ranks=ranks)
        assert torch.allclose(tiled(on_device, q[here], k[order], v[order]), expected[here], atol=1e-10)


def test_scores_that_are_computed_are_near_those_that_are_needed() -> None:
    """Computes half of the score matrix and a strip, not all of it."""
    one = row((300, 400, 400), (200, 100, 500))
    tiles = geometry(row_to_device(one, CPU)).tiling(torch.float32, None).tiles
    computed = sum(tile.bias.shape[0] * tile.strip * (to - start) for tile in tiles for start, to in tile.reaches)
    needed = sum(len(visible(one, at)) for at in range(one.real_tokens))
    assert needed < computed < 1.2 * needed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_is_computed_alike_whatever_is_in_its_row(dtype: torch.dtype) -> None:
    """Results are equal bit for bit, so step 1 is exactly ln 2, though cache and training pack rows differently."""
    pair = (37, 90, 61)
    alone, among = row(pair), row((5, 3, 7), pair, (70, 40, 90), (38, 91, 62))
    start = int(among.segments[1, 0])
    q, k, v = (part.detach().to(dtype) for part in inputs(len(among.tokens)))
    whole = tiled(row_to_device(among, CPU), q, k, v)[start : start + len(alone.tokens)]
    own = slice(start, start + len(alone.tokens))
    assert torch.equal(tiled(row_to_device(alone, CPU), q[own], k[own], v[own]), whole)


def test_torchs_function_is_called_as_it_is_declared_here() -> None:
    varlen_attn = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    known = inspect.signature(varlen_attn).parameters
    assert "is_causal" in known or "window_size" in known
    assert list(known)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert kernels.varlen_kernel("cpu", torch.bfloat16) is None
    assert kernels.varlen_kernel("cuda", torch.float32) is None
    assert kernels.varlen_kernel("cuda", torch.bfloat16) is not None
