"""Parts of gpu.py: layers that fit, kinds of kernels, fp8 matrix products and attention kernels."""

import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_spo.config.model_shape import ModelShape
from megatron_spo.planner.gpus import GPUS

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [T, heads, d], k and v [T, groups, d] of a row -> a tensor from which the backward pass can start."""


@dataclass(frozen=True)
class GpuFacts:
    """Peak FLOP/s and memory in bytes of the device, and changes of the model's config.json."""

    name: str
    peak: float
    memory: float
    shape: Mapping[str, Any] = field(default_factory=dict)
    is_tiny: bool = False


def tiny() -> GpuFacts:
    """Returns facts for a CPU in place of a GPU of 1 TFLOP/s, with a small model shape."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return GpuFacts("a CPU", 1e12, 256 * 2**20, {**shape, "vocab_size": 512, "head_dim": 16}, is_tiny=True)


def facts_of(name: str | None) -> GpuFacts:
    """Returns the facts of the first GPU from the planner's table; `name` overrides the driver's name."""
    said = torch.cuda.get_device_name(0)
    found = next((gpu for gpu in GPUS.values() if gpu.name == name or (not name and gpu.name in said.lower())), None)
    if found is None:
        raise SystemExit(f"{said}: the peak performance of this GPU is unknown; set --gpu to one of {', '.join(GPUS)}")
    return GpuFacts(said, found.bf16, torch.cuda.get_device_properties(0).total_memory)


def layers_that_fit(raw: Mapping[str, Any], memory: float, tokens: int) -> int:
    """Returns how many layers (from 1 to the model's own number) train in 85% of `memory` without recomputation.

    18 bytes per parameter (weights 2, gradients 4, main parameters 4, moments 8), and the activations of a row in
    bf16: about 34 bytes per token and hidden unit, and 6 per token and feed-forward unit.
    """
    hidden, ffn, heads = raw["hidden_size"], raw["intermediate_size"], raw["num_attention_heads"]
    size = raw.get("head_dim") or hidden // heads
    layer = hidden * (2 * size * (heads + raw["num_key_value_heads"]) + 3 * ffn)
    ends = 18 * 2 * raw["vocab_size"] * hidden
    kept = tokens * (34 * hidden + 6 * ffn)
    return max(1, min(raw["num_hidden_layers"], int((0.85 * memory - ends) // (18 * layer + kept))))


KINDS = {
    "attention": ("flash", "fmha", "attention", "softmax"),
    "matrix products": ("gemm", "cutlass", "cublas", "nvjet", "wgmma", "aten::mm", "aten::bmm", "aten::addmm"),
    "communication": ("nccl", "c10d", "gloo"),
    "optimizer": ("adam", "multi_tensor"),
    "moving": ("memcpy", "memset", "copy", "cat", "index", "gather", "scatter", "fill", "transpose"),
    "element by element": ("elementwise", "reduce", "norm", "silu", "mul", "add", "exp", "rope", "swiglu"),
}
"""Kind of kernel -> parts of kernel names; the first kind that matches is used."""


def kind_of(name: str) -> str:
    """Returns the kind of a kernel, or "other"."""
    return next((kind for kind, marks in KINDS.items() if any(mark in name.lower() for mark in marks)), "other")


def by_kind(events: Iterable[Any], *, on_gpu: bool) -> dict[str, float]:
    """Returns microseconds by kind of kernel: of the GPU's kernels, or of CPU operators without a GPU."""
    totals: dict[str, float] = {}
    for event in events:
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if is_kernel != on_gpu:
            continue
        taken = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = kind_of(event.key)
        totals[kind] = totals.get(kind, 0.0) + taken
    return totals


def fp8_products(raw: Mapping[str, Any], tokens: int) -> dict[str, float]:
    """Returns the time of the layers' products [tokens, in] x [in, out] in bf16 relative to fp8 (one scale per matrix).

    Empty if the GPU does not support fp8.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        return {}
    hidden, ffn = raw["hidden_size"], raw["intermediate_size"]
    scale, ratios = torch.ones((), device="cuda"), {}
    for name, (inner, outer) in {"gate and up": (hidden, 2 * ffn), "down": (ffn, hidden)}.items():
        a = torch.randn(tokens, inner, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(outer, inner, device="cuda", dtype=torch.bfloat16)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        plain = seconds_of(partial(torch.mm, a, b.t()), a.device)
        small = seconds_of(partial(torch._scaled_mm, a8, b8.t(), scale, scale, out_dtype=torch.bfloat16), a.device)
        ratios[name] = plain / small
    return ratios


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Returns the median wall-clock seconds of a call, synchronizing the device; the first call is a warm-up."""
    taken = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def attention_ways(segments: Tensor, device: torch.device) -> dict[str, Attention]:
    """Returns torch's attention kernels for the pairs of a row, with segments [n, 4] (start, shared, chosen, rejected).

    Padded: one block per pair, as long as the longest pair, with an explicit mask. Variable lengths: (prompt, chosen)
    and (rejected) one after another, causal from the end of the keys.
    """
    ways: dict[str, Attention] = {}
    index, mask = (part.to(device) for part in blocks(segments))

    def padded(backend: SDPBackend) -> Attention:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            repeats = q.shape[1] // k.shape[1]
            q, k, v = (part[index].transpose(1, 2) for part in (q, k, v))
            k, v = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return attend

    backends = {"math": SDPBackend.MATH}
    if device.type == "cuda":
        backends |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        ways |= varlen_way(segments, device)
    return ways | {f"padded, {name}": padded(backend) for name, backend in backends.items()}


def blocks(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Returns row positions [n, L] of each pair's tokens and their mask [n, 1, L, L]; padding attends to token 0."""
    start, shared, chosen, rejected = (part[:, None] for part in segments.unbind(1))
    place = torch.arange(int(segments[:, 1:].sum(1).max()))
    index = torch.where(place < shared + chosen + rejected, start + place, start)
    in_chosen = (place >= shared) & (place < shared + chosen)
    in_rejected = place >= shared + chosen
    mask = (place[:, None] >= place) & ~(in_rejected[:, :, None] & in_chosen[:, None])
    return index, mask[:, None]


def varlen_way(segments: Tensor, device: torch.device) -> dict[str, Attention]:
    """Returns torch's kernel for variable lengths (FlashAttention), if this version of torch has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return {}
    order, queries, keys = [], [0], [0]
    for start, shared, chosen, rejected in segments.tolist():
        first = list(range(start, start + shared + chosen))
        tail = list(range(start + shared + chosen, start + shared + chosen + rejected))
        for asked, seen in ((first, first), (tail, first[:shared] + tail)):
            order += seen
            queries.append(queries[-1] + len(asked))
            keys.append(keys[-1] + len(seen))
    most = (max(b - a for a, b in zip(bounds, bounds[1:], strict=False)) for bounds in (queries, keys))
    gathered = torch.tensor(order, device=device)
    bounds_q, bounds_k = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in (queries, keys))
    parameters = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    most_queries, most_keys = most

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        k, v = (part[gathered].repeat_interleave(repeats, dim=1) for part in (k, v))
        out = varlen_attn(q[: queries[-1]], k, v, bounds_q, bounds_k, most_queries, most_keys, **causal)
        assert isinstance(out, Tensor)  # a tuple only if the log-sum-exp is requested
        return out

    return {"variable lengths": attend}


def time_attention(
    ways: Mapping[str, Attention], shape: ModelShape, tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Returns the seconds of forward and backward of each kernel on random inputs."""
    taken = {}
    for name, attend in ways.items():
        parts = [
            torch.randn(tokens, heads, shape.head_dim, device=device, dtype=dtype, requires_grad=True)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        ]

        def once(attend: Attention = attend, parts: list[Tensor] = parts) -> None:
            attend(*parts).sum().backward()

        try:
            taken[name] = seconds_of(once, device)
        except RuntimeError as refused:  # the backend does not support this mask, shape or dtype
            print(f"attention, {name}: {str(refused).splitlines()[0]}")
    return taken
