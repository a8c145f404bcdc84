"""Non-finite numbers and gradient spikes. The embedding of one token is NaN, so only the pairs with it are affected."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megatron_spo.cli import main
from megatron_spo.convert.export import to_hf
from megatron_spo.errors import Anomaly
from megatron_spo.train.anomalies import DECAY, MOST_SKIPS, WARM_UP, GradientNorms
from tests.support.processes import NOT_COMPARED, TIMES, read_metrics, run_jobs
from tests.support.tiny import arithmetic_pairs, tiny_run, write_jsonl

BATCH, BAD_STEP = 4, 3
BAD_LINE = (BAD_STEP - 1) * BATCH + 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


def prepare(folder: Path) -> Path:
    """Writes 24 pairs in file order, one of which has the token whose embedding is NaN."""
    rows = arithmetic_pairs(24)
    rows[BAD_LINE - 1]["prompt"] = "#" + rows[BAD_LINE - 1]["prompt"]
    tiny_run(
        folder,
        pairs=rows,
        data={"row_length": 32, "shuffle": False},
        reference=None,
        loss={"name": "simpo"},
        training={"global_batch_size": BATCH, "steps": 6, "on_anomaly": "skip"},
    )
    token = AutoTokenizer.from_pretrained(folder / "model")("#").input_ids[0]
    weights = load_file(folder / "model/model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, folder / "model/model.safetensors", metadata={"format": "pt"})
    return folder


def train(folder: Path, *overrides: str) -> int:
    return main(["train", str(folder / "config.yaml"), *overrides])


def weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    to_hf(folder / run, folder / f"{run}-hf")
    return {
        name: tensor.nan_to_num(nan=7.0) for name, tensor in load_file(folder / f"{run}-hf/model.safetensors").items()
    }


SCHEDULES = {
    "penalty": [],
    "dual": ["spo.v=1.0"],
    "lookahead": [],
    "barrier": ["spo.v=1.0"],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_skipped_step_leaves_everything_as_it_was(folder: Path, schedule: str) -> None:
    """Compares with a run without that batch: with a constant learning rate only the step numbers differ."""
    given = [f"spo.schedule={schedule}", *SCHEDULES[schedule]]
    assert train(folder, *given) == 0
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    good = lines[: (BAD_STEP - 1) * BATCH] + lines[BAD_STEP * BATCH :]
    (folder / "good.jsonl").write_text("".join(good))
    assert train(folder, *given, "training.steps=5", f"data.train={folder}/good.jsonl", f"output={folder}/good") == 0
    skipped, expected = read_metrics(folder / "run"), read_metrics(folder / "good")
    alarm: dict[str, Any] = skipped.pop(("alarm", "", BAD_STEP))
    assert alarm["reason"] == "the loss is not a finite number"
    assert [pair.endswith(f"line {BAD_LINE}") for pair in alarm["pairs"]].count(True) == 1
    for (kind, name, step), line in expected.items():
        got = skipped[kind, name, step if step < BAD_STEP else step + 1]
        for metric in line.keys() - {*TIMES, "epoch"}:
            assert got[metric] == line[metric], (metric, step)
    ours, theirs = weights(folder, "run"), weights(folder, "good")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_stop_names_step_pair_and_checkpoint_and_skip_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(folder, "training.on_anomaly=stop", "checkpoint.every=1") == 3
    said = capsys.readouterr().err
    for part in (f"step {BAD_STEP}, train", f"pairs.jsonl line {BAD_LINE}", "run/checkpoints/step_00000002", "skip"):
        assert part in said
    status = json.loads((folder / "run/status.json").read_text())
    assert (status["state"], status["code"], status["checkpoint"]) == ("failed", 3, "step_00000002")
    assert train(folder) == 0
    assert train(folder, f"output={folder}/whole") == 0
    ours, theirs = weights(folder, "run"), weights(folder, "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_evaluation_that_is_not_finite(folder: Path) -> None:
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "good.jsonl").write_text("".join(lines[:8]))
    given = [f"data.train={folder}/good.jsonl", f"data.eval={folder}/pairs.jsonl", "training.steps=2"]
    assert train(folder, *given, "training.on_anomaly=stop") == 3
    assert train(folder, *given, f"output={folder}/other") == 0
    assert ("alarm", "", 2) in read_metrics(folder / "other")
    assert ("eval", "pairs", 2) not in read_metrics(folder / "other")


def test_spikes_are_measured_against_the_running_mean_across_a_restart(folder: Path) -> None:
    lines = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    del lines[BAD_LINE - 1]
    (folder / "good.jsonl").write_text("".join(lines))
    given = [f"data.train={folder}/good.jsonl", "training.spike_factor=1.05", "optimizer.lr=1e-5"]
    assert train(folder, *given, "training.steps=24") == 0
    assert train(folder, *given, "training.steps=40") == 0
    metrics = read_metrics(folder / "run")
    alarms = {step for kind, _, step in metrics if kind == "alarm"}
    assert alarms and min(alarms) > WARM_UP
    mean = count = 0.0
    for step in range(1, 41):
        if step in alarms:
            alarm: dict[str, Any] = metrics["alarm", "", step]
            assert "exceeds" in alarm["reason"] and len(alarm["pairs"]) >= BATCH - 1
            continue
        norm = metrics["train", "", step]["grad_norm"]
        assert count < WARM_UP or norm <= 1.05 * mean / (1 - DECAY**count)
        mean, count = DECAY * mean + (1 - DECAY) * norm, count + 1


def test_too_many_skips_in_a_row_end_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "prompt": "#" + row["prompt"]} for row in arithmetic_pairs(8)]
    write_jsonl(folder / "pairs.jsonl", rows)
    assert train(folder, "training.steps=30", "data.shuffle=true") == 3
    assert f"{MOST_SKIPS} steps in a row" in capsys.readouterr().err
    assert len(read_metrics(folder / "run")) == MOST_SKIPS


def test_a_taken_step_ends_the_row_of_skips() -> None:
    norms = GradientNorms()
    for _ in range(3):
        for _ in range(MOST_SKIPS - 1):
            norms = norms.skipped()
        norms = norms.taken(2.0)
    assert norms.mean == pytest.approx(2.0)
    with pytest.raises(Anomaly):
        for _ in range(MOST_SKIPS):
            norms = norms.skipped()


def test_all_ranks_skip_alike_in_every_layout(tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    layouts = {"dp2": [], "tp2": ["parallel.tensor=2"], "pp2": ["parallel.pipeline=2"]}
    config = str(folder / "config.yaml")
    run_jobs([("train", config, [f"output={folder}/{name}", *layout]) for name, layout in layouts.items()], 2)
    assert train(folder) == 0
    expected = read_metrics(folder / "run")
    for name in layouts:
        got = read_metrics(folder / name)
        assert got.keys() == expected.keys()
        alarm: dict[str, Any] = got.pop(("alarm", "", BAD_STEP))
        assert any(pair.endswith(f"line {BAD_LINE}") for pair in alarm["pairs"])
        for key, line in got.items():
            for metric in line.keys() - NOT_COMPARED:
                assert line[metric] == pytest.approx(expected[key][metric], rel=1e-4, abs=1e-4), (name, key, metric)
