"""A run resumes from its checkpoint: bit for bit in the same layout, and with the same results in another one."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_spo.cli import main
from tests.support.processes import Job, largest_difference, run_jobs
from tests.support.tiny import tiny_run

SUBSET = "data.rows=40"
OBJECTIVES = {
    "alpha-dual": ["loss.name=alpha_dpo", "spo.schedule=dual", "spo.lambda_unit=token", SUBSET],
    "dpo-lookahead": ["loss.name=dpo", "spo.schedule=lookahead", "optimizer.weight_decay=0.1"],
    "simpo-barrier": ["loss.name=simpo", "spo.schedule=barrier", "optimizer.decay=cosine"],
}
MOVES = [  # (processes, layout, step from which the next one resumes)
    (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"], 2),
    (1, [], 4),
    (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"], 6),
    (2, ["parallel.context=2"], None),
]
SAME = {"tp2": ["parallel.tensor=2"], "dp2-bf16": ["precision.dtype=bf16"]}


def set_back(run: Path, step: int) -> None:
    """Makes the next command resume from this step, as if the job had been killed after it."""
    (run / "checkpoints/latest").write_text(f"step_{step:08d}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    config = tiny_run(
        folder,
        shape={"tie_word_embeddings": True},
        pairs=50,
        held_out=7,
        optimizer={"warmup_steps": 2},
        training={"steps": 8, "eval_every": 3},
        checkpoint={"every": 2, "keep": 9},
    )

    def train(name: str, *overrides: str) -> Job:
        return ("train", str(config), [f"output={folder}/{name}", *overrides])

    bf16 = [f"reference.cache={folder}/bf16", "precision.dtype=bf16"]
    same = [(name, [*layout, *(bf16 if "bf16" in name else [])]) for name, layout in SAME.items()]
    references: list[Job] = [("reference", str(config), overrides) for overrides in ([], [SUBSET], bf16)]
    run_jobs([*references, *(train(f"{name}-whole", *overrides) for name, overrides in same)], 2)
    for name, _ in same:
        shutil.copytree(folder / f"{name}-whole", folder / f"{name}-resumed")
        set_back(folder / f"{name}-resumed", 4)
    run_jobs([train(f"{name}-resumed", *overrides) for name, overrides in same], 2)
    run_jobs([train(f"whole/{name}", *objective) for name, objective in OBJECTIVES.items()], 1)
    for processes, layout, step in MOVES:
        run_jobs([train(f"moved/{name}", *objective, *layout) for name, objective in OBJECTIVES.items()], processes)
        for name in OBJECTIVES:
            if step is not None:
                set_back(folder / "moved" / name, step)
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    target = run.with_name(f"{run.name}-hf")
    assert main(["convert", str(run), str(target), "--to", "hf"]) == 0
    return load_file(target / "model.safetensors")


@pytest.mark.parametrize("name", SAME)
def test_the_same_layout_goes_on_bit_for_bit(runs: Path, name: str) -> None:
    assert largest_difference(runs / f"{name}-resumed", runs / f"{name}-whole")[0] == 0.0
    got, expected = weights(runs / f"{name}-resumed"), weights(runs / f"{name}-whole")
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_three_other_layouts_in_the_middle_change_nothing(runs: Path, objective: str) -> None:
    difference, where = largest_difference(runs / "moved" / objective, runs / "whole" / objective)
    assert difference < 1e-4, where
    got, expected = weights(runs / "moved" / objective), weights(runs / "whole" / objective)
    assert max((got[key] - tensor).abs().max().item() for key, tensor in expected.items()) < 1e-4
