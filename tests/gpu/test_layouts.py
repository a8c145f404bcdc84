"""Two GPUs with NCCL give the numbers of one GPU."""

import math

import pytest
import torch

from tests.gpu.bench import DRY, Bench, differences, needs_gpu
from tests.gpu.conftest import LAYOUTS

pytestmark = [
    *needs_gpu,
    pytest.mark.skipif(not DRY and torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
WATCHED = ("loss", "loss/sft", "logps/chosen", "logps/rejected", "grad_norm")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32(bench: Bench, record_property, layout: str) -> None:
    ours = bench.metrics(f"{layout}-fp32")
    largest = differences(ours, bench.metrics("gpu-fp32"), *WATCHED)
    for name, value in largest.items():
        record_property(name, f"{value:.1e}")
    assert max(largest.values()) < 1e-3
    assert ours["train", "", 1]["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.engine
@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-vpp2", "dp2"])
@pytest.mark.parametrize(("precision", "bound"), [("engine", 0.05), ("fp8", 0.1)])
def test_transformer_engine(bench: Bench, record_property, layout: str, precision: str, bound: float) -> None:
    largest = differences(bench.metrics(f"{layout}-{precision}"), bench.metrics("engine"), "loss", "logps/chosen")
    record_property("loss", f"{largest['loss']:.1e}")
    assert max(largest.values()) < bound
