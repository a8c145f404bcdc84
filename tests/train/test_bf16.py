"""bf16 weights with fp32 main parameters: the trajectory stays close to fp32's and starts at exactly ln 2."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_spo.cli import main
from megatron_spo.model import optimizer
from megatron_spo.train import run as run_module
from tests.support.processes import read_metrics, run_jobs
from tests.support.tiny import tiny_run

STEPS = 20
BOUNDS = {"loss": 0.03, "spo/chosen_shift": 0.15, "spo/rejected_shift": 0.15}
"""Largest absolute difference from fp32 over all steps; bf16 has 8 significant bits, a response about 5 tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16")
    tiny_run(folder, pairs=32, reference=None, optimizer={"warmup_steps": 2}, precision=None, training={"steps": STEPS})
    for dtype in ("fp32", "bf16"):
        assert run(folder, "reference", dtype) == 0
    return folder


def run(folder: Path, command: str, dtype: str, *overrides: str) -> int:
    given = [f"precision.dtype={dtype}", f"reference.cache={folder}/cache-{dtype}", *overrides]
    return main([command, str(folder / "config.yaml"), *given])


MORE = {"penalty": [], "lookahead": [], "barrier": ["spo.barrier_rate=10"]}
"""At the default rate, rounding in the gap moves the barrier schedule out of these bounds."""


@pytest.mark.parametrize("schedule", MORE)
def test_bf16_stays_near_fp32(folder: Path, schedule: str) -> None:
    lines = {}
    for dtype in ("fp32", "bf16"):
        output = folder / f"{schedule}-{dtype}"
        assert run(folder, "train", dtype, f"spo.schedule={schedule}", f"output={output}", *MORE[schedule]) == 0
        lines[dtype] = read_metrics(output)
    first = lines["bf16"]["train", "", 1]
    assert first["loss/preference"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["spo/chosen_shift"] == first["spo/rejected_shift"] == 0
    moved = abs(lines["fp32"]["train", "", STEPS]["spo/rejected_shift"])
    for name, bound in BOUNDS.items():
        found = [(line, lines["fp32"][key]) for key, line in lines["bf16"].items() if key[0] != "alarm"]
        distance = max(abs(line[name] - exact[name]) for line, exact in found)
        assert distance < bound, name
    assert moved > 5 * BOUNDS["spo/rejected_shift"]  # so the bound would detect a run that does not train


@pytest.mark.parametrize(
    "shape", [{"vocab_size": 384}, {"vocab_size": 384, "tie_word_embeddings": True}, {"tie_word_embeddings": True}]
)
def test_gradients_added_on_a_cpu_are_those_that_megatron_adds(
    shape: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the layers exactly, and those of the vocabulary's weights up to the digits of bf16, which they are no
    longer rounded to. The head adds its own, unless its vocabulary is padded as in the last case."""
    tiny_run(tmp_path, pairs=16, shape=shape, data={"row_length": 64}, precision={"dtype": "bf16"})
    buffers, real = {}, run_module.make_trainable

    def watched(*given: Any, **named: Any) -> optimizer.Trainable:
        trainable = real(*given, **named)
        (chunk,) = trainable.chunks
        prepare = trainable.optimizer.prepare_grads

        def keep() -> Any:
            buffers[name] = {key: one.main_grad.clone() for key, one in chunk.named_parameters()}
            return prepare()

        monkeypatch.setattr(trainable.optimizer, "prepare_grads", keep)
        return trainable

    monkeypatch.setattr(run_module, "make_trainable", watched)
    monkeypatch.setattr(optimizer, "GRADIENT_PIECE", 100)  # fewer than a weight of the tiny model has
    assert main(["reference", str(tmp_path / "config.yaml")]) == 0
    for name in ("ours", "megatron"):
        assert main(["train", str(tmp_path / "config.yaml"), f"output={tmp_path / name}", "training.steps=1"]) == 0
        monkeypatch.setattr(optimizer, "_add_gradients_by_pieces", lambda chunk: None)
    assert buffers["ours"].keys() == buffers["megatron"].keys()
    for key, ours in buffers["ours"].items():
        of_vocabulary = len(ours) == 384
        scale = ours.abs().max() if of_vocabulary else 0
        torch.testing.assert_close(ours, buffers["megatron"][key], rtol=0, atol=float(scale) / 100)
        assert scale > 0 or not of_vocabulary


def test_layouts_agree_up_to_rounding(tmp_path: Path) -> None:
    """With tied embeddings, whose gradients come from two places and, in a pipeline, from two processes."""
    shape = {"vocab_size": 384, "tie_word_embeddings": True}
    config = str(tiny_run(tmp_path, pairs=16, shape=shape, precision={"dtype": "bf16"}, training={"steps": 2}))
    layouts = {"dp2": [], "tp2": ["parallel.tensor=2"], "pp2": ["parallel.pipeline=2"]}
    run_jobs([("reference", config, []), ("train", config, [f"output={tmp_path}/one"])], 1)
    run_jobs([("train", config, [f"output={tmp_path}/{name}", *keys]) for name, keys in layouts.items()], 2)
    one = read_metrics(tmp_path / "one")
    for name in layouts:
        for key, line in read_metrics(tmp_path / name).items():
            for metric in ("loss", "grad_norm"):
                assert line[metric] == pytest.approx(one[key][metric], rel=0.01), (name, key, metric)
