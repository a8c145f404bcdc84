"""Planned floating-point operations compared with torch's counter."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.planner.flops import BACKWARD_OF_ATTENTION, forward_flops, step_flops
from tests.planner.counted import SHAPE, as_planned, packed_row
from tests.planner.test_memory import config_of
from tests.support.megatron import load_model, megatron_sums
from tests.support.tiny import tiny_model


def _as_products(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, enable_gqa: bool, scale: float) -> Tensor:
    """Attention as two matrix products, because torch's counter does not count its fused CPU kernel."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return (scale * q @ k.transpose(-1, -2) + attn_mask).softmax(-1) @ v


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_against_torchs_counter(family: str, recompute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(tmp_path, family, **SHAPE)
    shape = read_model_shape(tmp_path)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", _as_products)
    model = load_model(tmp_path, recompute=recompute)
    config = config_of(parallel={"recompute": recompute})
    row = packed_row()
    forward = forward_flops(shape, as_planned(row))
    whole = step_flops(config, forward)
    router = 0 if shape.experts is None else 2 * len(row.tokens) * shape.hidden * shape.experts.count * shape.layers
    with FlopCounterMode(display=False) as counter:
        sums = megatron_sums(model, row)
        assert counter.get_total_flops() == pytest.approx(
            shape.layers * (forward.linear + forward.attention) + forward.head + router, rel=1e-6
        )
        sums.sum().backward()
    # two products fewer than a fused kernel, which recomputes the scores
    attention = whole.attention + (2 - BACKWARD_OF_ATTENTION) * forward.attention
    routers = router * {"none": 2, "selective": 2, "full": 3}[recompute]
    expected = shape.layers * (whole.linear + attention) + whole.head + routers
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_what_is_necessary_is_less() -> None:
    """Padding, partly masked blocks, recomputation and gradients of frozen weights are not counted."""
    from megatron_spo.planner.presets import shape_of
    from megatron_spo.planner.rows import RowSize

    shape = shape_of("Llama-3.1-8B")
    row = RowSize(tokens=1024, real=1000, entries=600, visible=200_000, segments=np.array([[500, 500], [500, 500]]))
    needed, done = forward_flops(shape, row, necessary=True), forward_flops(shape, row)
    assert needed.linear < done.linear and needed.attention < done.attention and needed.head == done.head
    full, lora = config_of(parallel={"recompute": "full"}), config_of(lora={"rank": 8})
    assert step_flops(full, done).linear == 4 * done.linear
    assert step_flops(full, done, necessary=True).linear == 3 * done.linear
    assert step_flops(lora, done).linear == 2 * done.linear
