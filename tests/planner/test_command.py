"""The command `megatron-spo plan`, and the memory estimate of `train`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_spo.cli import main
from megatron_spo.config.load import load_config
from megatron_spo.planner.at_start import memory_line, peak_line, shortage
from megatron_spo.planner.gpus import GIB
from megatron_spo.planner.memory import Memory
from megatron_spo.planner.presets import PRESETS
from tests.support.processes import ROOT
from tests.support.tiny import arithmetic_pairs, tiny_run, write_jsonl

WHOLE = ("parallel.tensor=8", "parallel.pipeline=1", "parallel.virtual_pipeline=null")
EXAMPLE = ROOT / "examples" / "llama3_70b" / "config.yaml"


def plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["plan", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Returns a configuration with local model and data."""
    return tiny_run(tmp_path, shape={"hidden_size": 64}, pairs=40, training={"steps": 2})


def test_the_70b_on_32_h100(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    code, text, _ = plan(capsys, EXAMPLE, "--gpus", 32, "--price", 2, "--json", out)
    assert code == 0
    assert "configured: TP4 SP PP8 VPP5" in text and "assumed: lognormal" in text
    assert "calibration: products reach 58.5% of the peak, from 1638 tokens/s/GPU" in text
    found = json.loads(out.read_text())
    assert found["configured"]["fits"] and 56 < found["configured"]["memory"]["total"] / GIB < 66 * 1.15
    times = [one["step_seconds"]["total"] for one in found["fitting"]]
    assert times == sorted(times) and len(times) > 5
    assert all(one["memory"]["total"] <= found["gpu"]["memory"] for one in found["fitting"])
    assert all(one["memory"]["total"] > found["gpu"]["memory"] for one in found["not_fitting"])
    assert found["configured"]["cost"] == pytest.approx(2 * found["configured"]["gpu_hours"])
    assert sum(v for k, v in found["configured"]["memory"].items() if k not in ("total", "stage")) == pytest.approx(
        found["configured"]["memory"]["total"]
    )


def test_lora_and_fp8_are_planned_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def planned(*overrides: str) -> dict[str, Any]:
        out = tmp_path / "plan.json"
        assert plan(capsys, EXAMPLE, *overrides, "--gpus", 32, "--json", out)[0] == 0
        configured: dict[str, Any] = json.loads(out.read_text())["configured"]
        return configured

    whole, lora, fp8 = planned(), planned("lora.rank=16"), planned("precision.fp8=tensorwise")
    assert lora["memory"]["optimizer"] < 0.02 * whole["memory"]["optimizer"]
    assert lora["step_seconds"]["compute"] < 0.75 * whole["step_seconds"]["compute"]
    assert fp8["step_seconds"]["compute"] < 0.75 * whole["step_seconds"]["compute"]


def test_one_node_does_not_hold_a_70b(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = plan(capsys, EXAMPLE, "--gpus", 8)
    assert code == 0
    assert "no layout fits on these GPUs" in text and "the configured layout cannot run" in text
    code, text, _ = plan(capsys, EXAMPLE, "lora.rank=16", *WHOLE, "--gpus", 8)
    assert "configured: TP8 SP PP1" in text and "cannot run" not in text


def test_experts_get_layouts_of_experts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    code, text, _ = plan(capsys, EXAMPLE, "--model", "Mixtral-8x7B", "--gpus", 32, "--gpu", "h200", "--json", out)
    assert code == 0 and "the seconds are a lower bound" in text
    assert {one["parallel"]["expert"] for one in json.loads(out.read_text())["fitting"]} >= {1, 2, 4, 8}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_planned_for(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    code, text, _ = plan(capsys, EXAMPLE, "--model", name, "--gpus", 16, "--gpu", "h200", "--json", out)
    found = json.loads(out.read_text())
    assert code == 0 and len(found["fitting"] + found["not_fitting"]) > 4, text


def test_rows_of_the_sft_set_are_counted(tiny: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in arithmetic_pairs(30, seed=2)]
    write_jsonl(tmp_path / "sft.jsonl", sft)

    def seconds(*overrides: str) -> float:
        out = tmp_path / "plan.json"
        code, text, _ = plan(capsys, tiny, *overrides, "--gpus", 1, "--json", out)
        assert code == 0 and ("sft.jsonl" in text) == bool(overrides)
        computing: float = json.loads(out.read_text())["configured"]["step_seconds"]["compute"]
        return computing

    own = [f"spo.sft_data={tmp_path}/sft.jsonl"]
    alone, as_many, twice = seconds(), seconds(*own), seconds(*own, "spo.sft_batch_size=16")
    assert 1.3 * alone < as_many < 2 * alone
    assert twice - alone == pytest.approx(2 * (as_many - alone), rel=0.15)


def test_lengths_are_measured_where_the_data_is(tiny: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    code, text, _ = plan(capsys, tiny, "--gpus", 2, "--json", out)
    assert code == 0 and "40 pairs, lengths measured on" in text
    found = json.loads(out.read_text())
    assert found["steps"] == 2 and found["lengths"]["longest"] < 40
    assumed = plan(capsys, tiny, "--gpus", 2, "--prompt-tokens", 20, "--response-tokens", 10)[1]
    assert "assumed: lognormal, medians 20 (prompt) and 10 (response)" in assumed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpus", "8", "--gpu", "v100"], "--gpu v100 is not one of h100, h200, b200, a100"),
        (["precision.fp8=tensorwise", "--gpus", "8", "--gpu", "a100"], "whose fp8 rate is not known"),
        (["--gpus", "8", "--prompt-tokens", "10"], "must be given together"),
        (["--gpus", "8", "--prompt-tokens", "10", "--response-tokens", "9999"], "exceed data.max_length"),
        (["model.path=nobody/model", "--gpus", "8"], "give a model of the same shape with --model"),
        (["--gpus", "8", "--json", "/dev/null/plan.json"], "/dev/null/plan.json cannot be written"),
        (["data.max_length=200000", "--gpus", "8"], "exceeds the model's context"),
    ],
)
def test_wrong_input_is_one_message(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = plan(capsys, EXAMPLE, *arguments)
    assert code == 2 and out == "" and told in err


def test_a_gpu_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ["--memory", 192, "--bf16", 1300, "--hbm", 5.3, "--nvlink", 448, "--network", 50, "--efficiency", 0.4]
    code, text, _ = plan(capsys, EXAMPLE, "--gpus", 32, "--gpu", "mine", *numbers)
    assert code == 0 and "32 x mine, 192.0 GiB each" in text and "40.0% of the peak, from given by the user" in text


def test_planning_loads_no_torch() -> None:
    code = (
        "import sys; from megatron_spo.cli import main\n"
        f"main(['plan', {str(EXAMPLE)!r}, '--gpus', '32'])\n"
        "print({'torch', 'megatron', 'transformers', 'datasets'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == "set()"


def test_the_configured_layout_is_judged_elsewhere_too() -> None:
    """A configuration for GPUs loads for planning on a machine without Transformer Engine."""
    assert load_config(EXAMPLE, ["precision.fp8=tensorwise"], elsewhere=True).precision.fp8 == "tensorwise"


def memory(total: float) -> Memory:
    return Memory(total - GIB, 0, 0, 0, 0, 0, 0, GIB)


def test_the_line_at_the_start_warns_of_what_cannot_fit() -> None:
    assert shortage(memory(3 * GIB), processes=2, free=6 * GIB) is None
    assert "memory of 8.00 GiB exceeds the free memory by 2.00 GiB" in str(
        shortage(memory(4 * GIB), processes=2, free=6 * GIB)
    )
    line = memory_line(memory(3 * GIB), processes=2, free=6 * GIB)
    assert line == "estimated memory: 2 processes with 3.00 GiB each (weights 2.00, reserved 1.00), of 6.00 GiB free"


def test_train_says_what_it_needs(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:

    assert main(["reference", str(tiny)]) == 0
    capsys.readouterr()
    assert main(["train", str(tiny)]) == 0
    said = capsys.readouterr().err
    assert said.count("estimated memory: ") == 1 and "warning" not in said
    monkeypatch.setattr("megatron_spo.train.memory.free_memory_of", lambda device: GIB // 4)
    assert main(["train", str(tiny), "training.steps=3"]) == 0
    assert "warning: estimated memory of" in capsys.readouterr().err


def test_the_line_at_the_end_compares_the_peak_with_the_estimate() -> None:
    assert peak_line(memory(11 * GIB), allocated=11 * GIB, reserved=12.5 * GIB) == (
        "peak memory of a GPU: tensors 11.0 GiB, +10.0% compared with the estimate of 10.0 GiB; 12.5 GiB reserved by "
        "torch, the estimate with CUDA, NCCL and fragmentation is 11.0 GiB"
    )
