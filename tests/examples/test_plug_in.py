"""The public functions on one small run, and the objective in a plain Megatron-Core loop (examples/plug_in)."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_spo import convert_checkpoint, evaluate_pairs, load_config, precompute_reference, run_training
from tests.support.processes import ROOT, launch, read_metrics
from tests.support.tiny import arithmetic_pairs, tiny_run, write_jsonl

SCRIPT = str(ROOT / "examples/plug_in/train.py")
STEPS = 3
COMPARED = ("loss", "loss/preference", "loss/sft", "spo/gap", "grad_norm", "pairs")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `megatron-spo train` that takes all pairs in every step, and its weights and tokens for the script."""
    desk = tmp_path_factory.mktemp("plug_in")
    pairs = arithmetic_pairs(8)
    path = tiny_run(
        desk,
        pairs=pairs,
        shape={"num_hidden_layers": 2, "vocab_size": 512},
        loss={"name": "dpo", "beta": 0.1},
        spo={"schedule": "penalty", "lambda": 1.0},
        training={"steps": STEPS},
    )
    config = load_config(path)
    precompute_reference(config)
    run_training(config)
    convert_checkpoint(f"{desk}/model", f"{desk}/megatron", "megatron")
    tokenizer = AutoTokenizer.from_pretrained(desk / "model")
    rows = []
    for pair in pairs:
        ids = {name: tokenizer(text)["input_ids"] for name, text in pair.items()}
        ends = {side: [*ids[side], tokenizer.eos_token_id] for side in ("chosen", "rejected")}
        rows.append({"prompt": ids["prompt"], **ends})
    write_jsonl(desk / "tokens.jsonl", rows)
    return desk


@pytest.mark.parametrize(("processes", "tensor"), [(1, 1), (2, 2), (2, 1)], ids=["alone", "tensor", "data"])
def test_a_plain_megatron_loop_trains_as_the_command_does(processes: int, tensor: int, desk: Path) -> None:
    options = ["--steps", str(STEPS), "--tensor", str(tensor), "--pairs", f"{desk}/tokens.jsonl"]
    done = launch([SCRIPT, *options, "--weights", f"{desk}/megatron"], processes)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    trained = read_metrics(desk / "run")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss/sft"] < lines[0]["loss/sft"] - 0.1  # the steps move the model
    for line in lines:
        expected = trained["train", "", line["step"]]
        for name in COMPARED:
            assert line[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), f"{name} at step {line['step']}"


def test_evaluate_pairs_measures_what_training_measures(desk: Path) -> None:
    """At the weights before the first step."""
    found = evaluate_pairs(f"{desk}/model", f"{desk}/pairs.jsonl", reference=desk / "model").estimates()
    trained = read_metrics(desk / "run")["train", "", 1]
    for name in ("logps/chosen", "logps/rejected", "rewards/accuracies", "spo/both_down"):
        assert found[name].value == pytest.approx(trained[name], rel=1e-5), name


def test_the_script_needs_no_files() -> None:
    done = launch([SCRIPT], 1)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert first["loss/preference"] == pytest.approx(0.693147, abs=1e-6) and first["spo/gap"] == pytest.approx(0)
    assert second["loss/sft"] < first["loss/sft"] and second["spo/gap"] < 0
