"""The rehearsed step of one rank, compared with the plan."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_spo.rehearsal.waits import unexplained
from tests.support.processes import ROOT, cli, launch
from tests.support.tiny import tiny_run

BIG, SMALL = (str(ROOT / f"examples/{name}/config.yaml") for name in ("llama3_70b", "ultrafeedback_8b"))
TORCH, ENGINE = "precision.layers=torch", "precision.layers=transformer_engine"
TP8 = ["parallel.tensor=8", "parallel.pipeline=2", "parallel.virtual_pipeline=null"]
Case = tuple[str, str | None, int, int, int | None, list[str]]
CASES: dict[str, Case] = {  # config, model, GPUs, rank, layers, overrides
    "70b": (BIG, None, 32, 0, 4, [TORCH, *TP8]),
    "70b-last": (BIG, None, 32, 16, 4, [TORCH, *TP8]),
    "70b-engine": (BIG, None, 32, 0, 4, [ENGINE, *TP8]),
    "70b-fp8": (BIG, None, 32, 0, 4, ["precision.fp8=tensorwise", *TP8]),
    "70b-vpp": (BIG, None, 32, 8, 8, [TORCH, "parallel.pipeline=4", "parallel.virtual_pipeline=2"]),
    "8b": (SMALL, None, 8, 0, 2, [TORCH]),
    "8b-full": (SMALL, None, 8, 3, 4, [TORCH, "parallel.recompute=full"]),
    "8b-lora": (SMALL, None, 8, 0, 2, [TORCH, "lora.rank=16", "reference.cache=null", "loss.name=dpo"]),
    "8b-cp": (SMALL, None, 8, 5, 2, [TORCH, "parallel.context=2"]),
    "mixtral-ep": (SMALL, "Mixtral-8x7B", 8, 0, 2, ["parallel.expert=4"]),
    "mixtral-tp": (SMALL, "Mixtral-8x7B", 8, 1, 2, ["parallel.tensor=4"]),
}
SHORT = ["training.global_batch_size=32"]
"""Fewer rows than in the examples; more rows do not need more memory once the pipeline is full."""


@pytest.fixture(scope="module", params=["shortened", pytest.param("whole", marks=pytest.mark.slow)])
def rehearsed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns the reports of all cases, of models with few layers or of whole ones."""
    out = tmp_path_factory.mktemp("rehearsed") / "out.json"
    cases: dict[str, Case] = {name: (*case[:4], None, case[5]) for name, case in CASES.items()}
    if request.param == "shortened":
        cases = {name: (*case[:5], [*case[5], *SHORT]) for name, case in CASES.items()}
    done = launch([str(Path(__file__).with_name("cases.py")), str(out), json.dumps(cases)], 1)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", CASES)
def test_memory_is_that_of_the_plan(rehearsed: dict[str, Any], name: str) -> None:
    found = rehearsed[name]
    planned = found["planned"]
    for part in ("weights", "gradients", "optimizer"):
        assert found[part] == pytest.approx(planned[part], rel=0.01), part
    assert found["peak"] == pytest.approx(sum(planned.values()) - planned["reserved"], rel=0.1), found["text"]


@pytest.mark.parametrize("name", CASES)
def test_every_wait_in_a_row_has_a_reason(rehearsed: dict[str, Any], name: str) -> None:
    assert rehearsed[name]["unexplained"] == [], rehearsed[name]["text"]


def test_a_wait_in_every_row_without_a_reason_is_named() -> None:
    known, unknown = "megatron_spo/train/metrics.py reduce_sums", "megatron_spo/reference/sources.py of"
    waits = {("tolist", known): 9, ("item", unknown): 3, ("tolist", unknown): 2}
    assert unexplained(waits, 3) == [f"item in {unknown}: 3"]


def test_communication_is_that_of_the_layout(rehearsed: dict[str, Any]) -> None:
    """By hand. A layer of a sequence-parallel model gathers the inputs of two products in the forward pass, and again
    in the backward pass, and the gradients of two outputs; the embedding gathers one gradient."""
    found = rehearsed["70b"]
    rows = found["rows"]
    assert found["calls"]["all-gather TP"] == rows * (found["layers"] // 2 * 6 + 1)
    assert (found["calls"]["send PP"], found["calls"]["recv PP"]) == (rows, rows)
    assert found["sent"]["send PP"] == found["sent"]["recv PP"]
    assert found["sent"]["send PP"] % (2 * 8192) == 0
    assert found["sent"]["reduce-scatter DP"] == found["gradients"] == 2 * found["sent"]["all-gather DP"]
    assert found["calls"].keys() == rehearsed["70b-engine"]["calls"].keys()
    assert "all-to-all EP" in rehearsed["mixtral-ep"]["calls"]
    assert rehearsed["8b-cp"]["calls"]["all-gather CP"] == rehearsed["8b-cp"]["rows"] * rehearsed["8b-cp"]["layers"]


def test_fp8_is_named_as_a_stand_in(rehearsed: dict[str, Any]) -> None:
    assert "layers of Transformer Engine, by a stand-in" in rehearsed["70b-fp8"]["text"]
    assert "in fp8 (tensorwise)" in rehearsed["70b-fp8"]["text"]
    fp8, bf16 = rehearsed["70b-fp8"]["sent"]["all-gather TP"], rehearsed["70b-engine"]["sent"]["all-gather TP"]
    assert fp8 < 0.8 * bf16


def test_the_command(tmp_path: Path) -> None:
    config = str(tiny_run(tmp_path, pairs=64, shape={"num_hidden_layers": 2}, precision={"dtype": "bf16"}))
    done = cli("rehearse", config, "--gpus", "4", "parallel.tensor=2", "--every-rank")
    assert done.returncode == 0, done.stderr
    assert "one step of rank 0 of 4, TP2 PP1: stage 0, 2 of 2 layers" in done.stdout
    assert "measured on" in done.stdout and "shards of all ranks" in done.stdout
    wrong = cli("rehearse", config, "--gpus", "4", "--rank", "4")
    assert (wrong.returncode, wrong.stderr.strip()) == (2, "error: --rank 4 does not exist; give a rank from 0 to 3")
