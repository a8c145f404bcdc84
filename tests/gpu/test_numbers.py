"""Megatron's own layers on one GPU, compared with the CPU; checkpoints; waits of the process for the GPU."""

import math
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.gpu.bench import Bench, differences, has_engine, needs_gpu

pytestmark = needs_gpu
WATCHED = ("loss", "loss/sft", "logps/chosen", "logps/rejected", "grad_norm")


@pytest.mark.parametrize("run", ["fp32", "fp32-simpo", "fp32-dual"])
def test_fp32_equals_the_cpu(bench: Bench, record_property, run: str) -> None:
    largest = differences(bench.metrics(f"gpu-{run}"), bench.metrics(f"cpu-{run}"), *WATCHED)
    for name, value in largest.items():
        record_property(name, f"{value:.1e}")
    assert max(largest.values()) < 1e-3


def test_bf16_is_near_the_cpu(bench: Bench, record_property) -> None:
    largest = differences(bench.metrics("gpu-bf16"), bench.metrics("cpu-bf16"), *WATCHED)
    for name, value in largest.items():
        record_property(name, f"{value:.1e}")
    assert max(largest.values()) < 0.05


@pytest.mark.parametrize("run", ["gpu-fp32", "gpu-bf16"])
def test_first_step_of_dpo_is_ln_2(bench: Bench, record_property, run: str) -> None:
    """The reference pass and the step use the same rows here, so that the log-probs are equal bit for bit."""
    off = bench.metrics(run)["train", "", 1]["loss/preference"] - math.log(2)
    record_property("off", f"{off:.1e}")
    assert abs(off) < 1e-6


def test_layers_are_megatrons(bench: Bench) -> None:
    found = bench.result("layers-torch")
    assert found["classes"]["qkv"] == "ColumnParallelLinear"
    assert found["device"].startswith("cuda")
    assert found["other_keys"] == found["unmarked"] == []


def test_adam(bench: Bench, record_property) -> None:
    """Any Adam that has never stepped can be saved and loaded."""
    found = bench.result("fresh")
    record_property("adam", found["adam"])
    assert found["step"] == 0
    if has_engine():
        assert found["adam"].endswith("FusedAdam")


def test_memory_is_measured(bench: Bench, record_property) -> None:
    """The numbers are of the largest GPU, in GiB."""
    for line in (metrics for (kind, _, _), metrics in bench.metrics("gpu-bf16").items() if kind == "train"):
        record_property("GiB", f"{line['memory/allocated']:.4f}")
        assert 0 < line["memory/allocated"] <= line["memory/reserved"] < 16


def test_checkpoint_comes_back_bit_for_bit(bench: Bench, tmp_path: Path) -> None:
    bench.metrics("gpu-bf16")
    assert bench.error("resave") == ""
    states = []
    for name in ("checkpoints", "checkpoints-again"):
        dcp_to_torch_save(bench.folder / "gpu-bf16" / name / "step_00000005", tmp_path / f"{name}.pt")
        states.append(torch.load(tmp_path / f"{name}.pt", weights_only=False))
    tensors = {key: value for key, value in states[0].items() if isinstance(value, torch.Tensor)}
    assert any("exp_avg" in key for key in tensors)
    for key, value in tensors.items():
        assert torch.equal(value, states[1][key]), key


def test_resumed_run_goes_on(bench: Bench, record_property) -> None:
    """Results are not equal bit for bit, as the attention kernel's backward pass adds in no fixed order."""
    resumed, whole = bench.metrics("resumed"), bench.metrics("gpu-bf16")
    shared = resumed.keys() & whole.keys()
    largest = differences({key: resumed[key] for key in shared}, {key: whole[key] for key in shared}, *WATCHED)
    record_property("loss", f"{largest['loss']:.1e}")
    assert ("train", "", 5) in shared
    assert max(largest.values()) < 0.02


@pytest.mark.parametrize("run", ["waits", pytest.param("engine-waits", marks=pytest.mark.engine)])
def test_the_process_does_not_wait_row_by_row(bench: Bench, record_property, run: str) -> None:
    """The last step's pass has fewer waits than rows; the first passes also compile and allocate."""
    last = next(one for one in reversed(bench.result(run)[:-1]) if one["rows"] > 1)
    record_property("rows", last["rows"])
    record_property("waits", last["waits"])
    record_property("places", last["places"])
    assert last["waits"] < last["rows"]
