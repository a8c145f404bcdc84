"""bf16 weights with fp32 main parameters: the trajectory stays close to fp32's and starts at exactly ln 2."""

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_spo.cli import main
from megatron_spo.model import optimizer
from megatron_spo.train import run as run_module
from tests.support.processes import read_metrics
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


def test_gradients_added_by_pieces_are_those_that_megatron_adds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, added, real = {}, {}, run_module.make_trainable

    def watched(*given: Any, **named: Any) -> optimizer.Trainable:
        trainable = real(*given, **named)
        added[name] = [parameter for chunk in trainable.chunks for parameter in chunk.parameters()]
        return trainable

    monkeypatch.setattr(run_module, "make_trainable", watched)
    monkeypatch.setattr(optimizer, "GRADIENT_PIECE", 100)  # fewer than a weight of the tiny model has
    for name in ("pieces", "megatron"):
        output = folder / name
        assert run(folder, "train", "bf16", f"output={output}", "training.steps=4", "data.row_length=64") == 0
        lines[name] = [
            {key: value for key, value in line.items() if key.startswith(("loss", "spo/", "grad"))}
            for key, line in read_metrics(output).items()
            if key[0] == "train"
        ]
        monkeypatch.setattr(optimizer, "_add_gradients_by_pieces", lambda chunk: None)
    assert len(lines["pieces"]) == 4 and lines["pieces"][0]["grad_norm"] > 0
    assert lines["pieces"] == lines["megatron"]
    assert all(parameter.grad_added_to_main_grad for parameter in added["pieces"])
    assert not any(parameter.grad_added_to_main_grad for parameter in added["megatron"])
