"""The arithmetic of the benchmarks, and that they run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_spo.planner.presets import FOLDER
from tests.planner.test_memory import config_of
from tests.support.processes import ROOT

LLAMA = json.loads((FOLDER / "Llama-3.1-8B" / "config.json").read_text())


def test_a_number_below_its_floor_is_named() -> None:
    import run

    floors = {"speed": {"at_least": 2.0}, "wait": {"at_most": 0.1}}
    assert run.broken({"speed": 2.0, "wait": 0.1, "other": 0}, floors, whole=True) == []
    assert run.broken({"speed": 1.9, "wait": 0.2}, floors, whole=False) == [
        "speed: 1.9, must be at least 2",
        "wait: 0.2, must be at most 0.1",
    ]
    assert run.broken({"wait": 0}, floors, whole=False) == []
    assert run.broken({"wait": 0}, floors, whole=True) == ["speed: not measured, must be at least 2"]


def test_slopes() -> None:
    from curves import Curve

    curve = Curve("x", (1, 10, 100), (2, 20, 200), (5, 500, 50_000))
    assert curve.slopes() == pytest.approx((1, 2))


def test_layers_that_fit_and_no_more_than_there_are() -> None:
    import gpu_parts

    one = 18 * (4096 * (2 * 128 * 40) + 3 * 4096 * 14336) + 4096 * (34 * 4096 + 6 * 14336)
    ends = 18 * 2 * 128256 * 4096
    assert gpu_parts.layers_that_fit(LLAMA, (ends + 7.5 * one) / 0.85, 4096) == 7
    assert gpu_parts.layers_that_fit(LLAMA, 1e15, 4096) == 32
    assert 15 <= gpu_parts.layers_that_fit(LLAMA, 139.8 * 2**30, 4096) < 32


@pytest.mark.parametrize(
    "name, kind",
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32", "matrix products"),
        ("void flash::flash_fwd_kernel<...>", "attention"),
        ("ncclDevKernel_AllReduce_Sum_f32", "communication"),
        ("void at::native::vectorized_elementwise_kernel", "element by element"),
        ("Memcpy HtoD", "moving"),
        ("multi_tensor_apply_kernel<AdamFunctor>", "optimizer"),
        ("mystery", "other"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    import gpu_parts

    assert gpu_parts.kind_of(name) == kind


def test_attention_of_the_comparison_is_that_of_the_model(tmp_path: Path) -> None:
    """The masked blocks compared with our attention give the same result, so that the times are of the same work."""
    import gpu_parts
    import measure
    from work import Model, random_rows

    from megatron_spo.model.attention import row_to_device

    measure.write_model(tmp_path / "model", hidden=64, layers=1)
    model = Model(measure.write_config(tmp_path))
    (row,) = random_rows(1024, [(9, 5, 12), (17, 8, 3)], per_row=2)
    core = model.trainable.chunks[0].decoder.layers[0].self_attention.core_attention
    shape, cpu = model.shape, torch.device("cpu")
    q, k, v = (torch.randn(len(row.tokens), heads, shape.head_dim) for heads in (shape.heads, *2 * [shape.kv_heads]))
    ours = core(q[:, None], k[:, None], v[:, None], None, packed_seq_params=row_to_device(row, cpu))[:, 0]
    segments = torch.from_numpy(row.segments)
    padded = gpu_parts.attention_ways(segments, cpu)["padded, math"](q, k, v).transpose(1, 2).flatten(2)
    lengths = row.segments[:, 1:].sum(1)
    theirs = torch.cat([block[:length] for block, length in zip(padded, lengths, strict=True)])
    torch.testing.assert_close(ours, theirs)


def test_necessary_operations() -> None:
    """Operations of one pair by hand: 2 per weight and token, 4 per head dimension and visible key; times 3 for both
    passes."""
    import work

    from megatron_spo.planner.presets import shape_of

    (row,) = work.random_rows(100, [(10, 4, 6)], per_row=1)
    visible = sum(range(1, 15)) + sum(10 + i for i in range(1, 7))
    found = work.needed(row)
    assert (found.real, found.entries, found.visible) == (20, 10, visible)

    shape = shape_of("Llama-3.1-8B")
    layer = 2 * 20 * (4096 * 128 * 80 + 3 * 4096 * 14336) + 4 * visible * 4096
    assert work.necessary_flops(config_of(), shape, [row]) == 3 * (32 * layer + 2 * 10 * 4096 * 128256)


@pytest.mark.slow
def test_gpu_benchmark_on_a_cpu(tmp_path: Path) -> None:
    """On a CPU, the table is complete, and MFU is operations / seconds / peak."""
    script, out = str(ROOT / "tools/bench/gpu.py"), tmp_path / "gpu.json"
    command = [sys.executable, script, "--tiny", "--layers", "2", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {result["name"]: result for result in json.loads(out.read_text())["results"]}
    flops = float(results["gpu/MFU"]["note"].split()[0])
    expected = flops / results["gpu/step"]["value"] / 1e12
    assert results["gpu/MFU"]["value"] == pytest.approx(expected, rel=0.01)
    shares = [result["value"] for name, result in results.items() if name.startswith("gpu/kernels/")]
    assert sum(shares) == pytest.approx(1) and len(shares) >= 4
    assert {"gpu/ours over TRL", "gpu/attention/ours", "gpu/host syncs", "gpu/peak memory"} <= results.keys()


@pytest.mark.slow
def test_make_bench_measures_all_that_has_a_floor(tmp_path: Path) -> None:
    """`--quick` runs and compares no number; speed.py is tested below."""
    import run

    others = [name for name in run.BENCHMARKS if name != "speed"]
    command = [sys.executable, str(ROOT / "tools/bench/run.py"), "--quick", "--out", str(tmp_path), "--only", *others]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = {result["name"] for result in json.loads((tmp_path / "results.json").read_text())["results"]}
    floors = json.loads((ROOT / "tools/bench/floors.json").read_text())
    assert {name for name in floors if " over trl" not in name and " over plain" not in name} <= measured


@pytest.mark.slow
def test_the_comparison_on_a_real_model(tmp_path: Path) -> None:
    """On random weights: with an SFT term, full training and TRL have the same losses, and so has LoRA's first step."""
    out = tmp_path / "real.json"
    command = [sys.executable, str(ROOT / "tools/bench/real.py"), "--quick", "--dtype", "fp32", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {result["name"]: result for result in json.loads(out.read_text())["results"]}
    for name in ("loss", "logps/chosen", "logps/rejected"):
        apart = [one["value"] for key, one in results.items() if f"/{name} apart" in key]
        assert len(apart) == 4 and max(apart) < 1e-3, (name, apart)
    for kind in ("full", "lora"):
        assert results[f"real/{kind} fp32/share of the peak"]["value"] > 0
        assert results[f"real/{kind} fp32/ours/memory"]["value"] > 100


@pytest.mark.slow
def test_trl_and_plain_compute_what_we_compute(tmp_path: Path) -> None:
    """All four programs train the same way: their losses agree to 1e-4 (which speed.py asserts)."""
    out = tmp_path / "speed.json"
    command = [sys.executable, str(ROOT / "tools/bench/speed.py"), "--quick", "--mixes", "reason", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    values = {result["name"]: result["value"] for result in json.loads(out.read_text())["results"]}
    apart = [value for name, value in values.items() if "loss apart" in name]
    assert len(apart) == 3 and np.max(apart) < 1e-4
