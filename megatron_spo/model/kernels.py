"""GPU attention kernels for segments of variable length, with causal masks aligned at the end of the keys.

They take q [queries of all segments, heads, d], k and v [keys of all segments, groups, d] and the bounds of the
segments in queries and keys.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor, "Varlen"], Tensor]
"""(q, k, v, segments) -> [queries of all segments, heads, d]."""


@dataclass(frozen=True)
class Varlen:
    """S segments whose queries are the row's tokens in order.

    order            [NK]         row position of each key, segment by segment
    queries, keys    int32 [S + 1] bounds of the segments among queries and keys
    """

    order: Tensor
    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int

    def attend(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns attention [T, heads * d] of q [T, heads, d] over k and v [T, groups, d]."""
        return kernel(q.contiguous(), k.index_select(0, self.order), v.index_select(0, self.order), self).flatten(1)


@cache
def varlen_kernel(device: str, dtype: torch.dtype) -> Kernel | None:
    """Returns the kernel for tensors of this device and dtype, or None if there is none (on a CPU, in fp32)."""
    if device != "cuda" or dtype == torch.float32:
        return None
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and later, see device.check_device

    return of_torch(varlen_attn)


def of_torch(function: Callable[..., Any]) -> Kernel:
    """Returns a kernel from torch.nn.attention.varlen.varlen_attn, whose arguments for causal masks and grouped heads
    differ between versions; all of them align the mask at the end.

    Later versions promise that a segment is computed alike whatever the others are, if its keys are not split.
    """
    known = inspect.signature(function).parameters
    fixed: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if "num_splits" in known:
        fixed["num_splits"] = 1

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Varlen) -> Tensor:
        grouped = {}
        if q.shape[1] != k.shape[1]:
            if "enable_gqa" in known:
                grouped = {"enable_gqa": True}
            else:
                repeats = q.shape[1] // k.shape[1]
                k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        bounds = (segments.queries, segments.keys, segments.most_queries, segments.most_keys)
        out: Tensor = function(q, k, v, *bounds, **fixed, **grouped)
        return out

    return attend
