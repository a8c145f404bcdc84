"""Transformer Engine's layers and fp8 on one GPU."""

import math

import pytest

from tests.gpu.bench import Bench, able_recipes, differences, needs_gpu

pytestmark = [*needs_gpu, pytest.mark.engine]
WATCHED = ("loss", "loss/sft", "logps/chosen", "logps/rejected", "grad_norm")


def test_layers_are_transformer_engines(bench: Bench) -> None:
    found = bench.result("layers-engine")
    assert found["classes"] == {
        "qkv": "TELayerNormColumnParallelLinear",
        "fc2": "TERowParallelLinear",
        "core": "PairAttention",
        "q_norm": "SequenceParallelRMSNorm",
        "final": "SequenceParallelRMSNorm",
    }
    assert found["other_keys"] == found["unmarked"] == []


def test_bf16_is_near_megatrons_layers(bench: Bench, record_property) -> None:
    largest = differences(bench.metrics("engine"), bench.metrics("torch"), *WATCHED)
    for name, value in largest.items():
        record_property(name, f"{value:.1e}")
    assert max(largest.values()) < 0.05


def test_first_step_of_dpo_is_ln_2(bench: Bench) -> None:
    first = bench.metrics("engine")["train", "", 1]
    assert first["loss/preference"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("run", ["to-engine", "to-torch"])
def test_a_checkpoint_crosses(bench: Bench, record_property, run: str) -> None:
    crossed, whole = bench.metrics(run), bench.metrics("torch")
    shared = crossed.keys() & whole.keys()
    largest = differences({key: crossed[key] for key in shared}, {key: whole[key] for key in shared}, *WATCHED)
    record_property("loss", f"{largest['loss']:.1e}")
    assert ("train", "", 5) in shared
    assert max(largest.values()) < 0.05


@pytest.mark.parametrize("recipe", able_recipes())
def test_fp8_trains_as_bf16_does(bench: Bench, record_property, recipe: str) -> None:
    ours, plain = bench.metrics(f"fp8-{recipe}"), bench.metrics(f"bf16-{recipe}")
    largest = differences(ours, plain, *WATCHED)
    for name, value in largest.items():
        record_property(name, f"{value:.1e}")
    assert largest["loss"] > 0, "fp8 gave the very digits of bf16: it was not used"
    assert largest["loss"] < 0.1 and largest["logps/chosen"] < 0.1
    assert ours["train", "", 5]["loss/sft"] < ours["train", "", 1]["loss/sft"]


@pytest.mark.parametrize("recipe", [recipe for recipe in able_recipes() if recipe != "delayed"])
def test_first_step_in_fp8_is_ln_2(bench: Bench, record_property, recipe: str) -> None:
    """The reference pass and the step use the same rows here; with other rows, tensorwise scaling would differ."""
    off = bench.metrics(f"fp8-{recipe}")["train", "", 1]["loss/preference"] - math.log(2)
    record_property("off", f"{off:.1e}")
    assert abs(off) < 1e-6


@pytest.mark.parametrize("recipe", [recipe for recipe in able_recipes() if recipe != "delayed"])
def test_a_cache_of_fp8_is_refused_in_bf16(bench: Bench, recipe: str) -> None:
    bench.metrics(f"fp8-{recipe}")
    assert f"the cache has 'bf16, Transformer Engine, fp8 {recipe}'" in bench.error(f"refused-{recipe}")


@pytest.mark.parametrize("recipe", [recipe for recipe in able_recipes() if recipe == "delayed"])
def test_delayed_scales_are_in_the_checkpoint(bench: Bench, record_property, recipe: str) -> None:
    resumed, whole = bench.metrics("fp8-delayed-resumed"), bench.metrics("fp8-delayed")
    line = ("train", "", 4)  # the first step after resuming; scales of 1 would change it
    off = abs(resumed[line]["loss"] - whole[line]["loss"]) / whole[line]["loss"]
    record_property("off", f"{off:.1e}")
    assert off < 2e-3
