"""Compares the kernel for variable lengths with torch's masked attention; tests the time of a step's phases."""

import torch

from megatron_spo.model.attention import ScoreRule, row_to_device
from megatron_spo.model.kernels import varlen_kernel
from megatron_spo.runtime.clock import Clock
from tests.gpu.bench import needs_gpu
from tests.model.test_attention import geometry, row

pytestmark = needs_gpu


def test_kernel_equals_masked_attention(record_property) -> None:
    device = torch.device("cuda")
    kernel = varlen_kernel("cuda", torch.bfloat16)
    assert kernel is not None
    one = row((70, 300, 90), (5, 3, 7), (200, 150, 260), multiple=16)
    torch.manual_seed(0)
    exact = [torch.randn(len(one.tokens), heads, 64, device=device, requires_grad=True) for heads in (8, 2, 2)]
    lowered = [part.detach().bfloat16().requires_grad_() for part in exact]
    on_device = geometry(row_to_device(one, device))
    q, k, v = exact
    expected = on_device.tiling(torch.float32, None).attend(q, k, v, ScoreRule(64**-0.5))
    found = on_device.varlen().attend(kernel, *lowered)
    weights = torch.randn_like(expected)
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, lowered, weights.bfloat16()), torch.autograd.grad(expected, exact, weights),
        strict=True,
    )  # fmt: skip
    worst = max(float((ours.float() - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
    record_property("largest relative distance", f"{worst:.1e}")
    assert worst < 0.02


def test_a_pair_is_computed_alike_whatever_is_in_its_row() -> None:
    """The forward pass is equal bit for bit, so step 1 is ln 2 though cache and training pack rows differently."""
    device, pair = torch.device("cuda"), (37, 90, 61)
    kernel = varlen_kernel("cuda", torch.bfloat16)
    assert kernel is not None
    alone, among = row(pair), row((5, 3, 7), pair, (70, 400, 90))
    torch.manual_seed(0)
    q, k, v = (torch.randn(len(among.tokens), n, 64, device=device, dtype=torch.bfloat16) for n in (8, 2, 2))
    start = int(among.segments[1, 0])
    own = slice(start, start + len(alone.tokens))
    outs = [
        geometry(row_to_device(one, device)).varlen().attend(kernel, q[part], k[part], v[part])
        for one, part in ((alone, own), (among, slice(None)))
    ]
    assert torch.equal(outs[0], outs[1][own])


def test_seconds_of_a_gpu_are_those_of_its_stream() -> None:
    clock = Clock(torch.device("cuda"))
    big = torch.randn(8192, 8192, device="cuda")
    clock.start()
    with clock.phase("forward_backward"):
        for _ in range(20):
            big = big @ big / 8192
    with clock.phase("optimizer"):
        big = big @ big
    found = clock.read()
    assert found["seconds/forward_backward"] > 5 * found["seconds/optimizer"] > 0
    assert found["seconds/forward_backward"] <= found["seconds"]
