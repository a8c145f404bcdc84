"""Every layout gives the numbers of one process; a reference cache filled in one layout works in all."""

import math
from pathlib import Path

import pytest

from tests.support.grids import grid, layout_settings, selected
from tests.support.processes import Job, largest_difference, read_metrics, run_jobs
from tests.support.tiny import tiny_model, tiny_run

LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2-sp": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "dp2": (2, []),
    "pp2-uneven": (2, ["parallel.pipeline=2", "parallel.layers_per_stage=[3,1]", "parallel.recompute=selective"]),
    "pp2-vpp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "dp2-recompute": (2, ["parallel.recompute=full"]),
    "cp2": (2, ["parallel.context=2"]),
    "cp2-tp2-sp": (4, ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true"]),
    "cp2-pp2": (4, ["parallel.context=2", "parallel.pipeline=2", "parallel.recompute=full"]),
    "cp2-dp2": (4, ["parallel.context=2"]),
    "tp2-pp2-vpp2-sp": (
        4,
        ["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.sequence=true"],
    ),
    "dp2-pp2-vpp2": (4, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "tp2-pp2-sp": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "dp2-pp2": (4, ["parallel.pipeline=2"]),
    "dp2-tp2": (4, ["parallel.tensor=2"]),
}
TIED = ["model.path={folder}/tied", "reference.cache={folder}/tied-cache"]
"""Uses a Qwen3 (query and key norms) with tied embeddings and a vocabulary that no layout divides, instead of a
Llama."""
OBJECTIVES = {  # each schedule, in every layout
    "none-hinge": ["loss.name=hinge", "spo.schedule=none"],
    "sft": ["spo.schedule=sft"],
    "penalty-dpo": ["loss.name=dpo"],
    "penalty-simpo-token-tied": ["loss.name=simpo", "spo.lambda_unit=token", "spo.lambda=5", *TIED],
    "penalty-pair-small-rows": ["loss.name=dpo", "spo.constraint=pair", "data.row_length=32"],
    "dual-alpha": ["loss.name=alpha_dpo", "spo.schedule=dual", "spo.lambda_unit=token"],
    "alternating-ipo-tied": ["loss.name=ipo", "spo.schedule=alternating", *TIED],
    "lookahead-dpo-tied": ["loss.name=dpo", "spo.schedule=lookahead", *TIED],
    "barrier-simpo": ["loss.name=simpo", "spo.schedule=barrier"],
}
CELLS = {
    (layout, objective): [*layout_settings(*LAYOUTS[layout]), *OBJECTIVES[objective], objective]
    for layout in LAYOUTS
    for objective in OBJECTIVES
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Runs what the selected tests compare, and the same objectives in one process."""
    folder = tmp_path_factory.mktemp("layouts")
    tiny_model(folder / "tied", "qwen3", tie_word_embeddings=True, vocab_size=301)
    config = tiny_run(
        folder,
        pairs=22,
        held_out=7,
        optimizer={"warmup_steps": 2, "weight_decay": 0.01},
        training={"steps": 4, "eval_every": 3},
    )

    def train(name: str, objective: str, overrides: list[str]) -> Job:
        settings = [override.format(folder=folder) for override in OBJECTIVES[objective]]
        return "train", str(config), [f"output={folder}/{name}/{objective}", *settings, *overrides]

    cells = sorted(selected(request, "layout", "objective"))
    jobs: dict[int, list[Job]] = {
        2: [  # the cache is filled at TP2
            ("reference", str(config), ["parallel.tensor=2", *(override.format(folder=folder) for override in model)])
            for model in ([], TIED)
        ],
        1: [train("one", objective, []) for objective in sorted({objective for _, objective in cells})],
        4: [],
    }
    for layout, objective in cells:
        processes, overrides = LAYOUTS[layout]
        jobs[processes].append(train(layout, objective, overrides))
    for processes, wanted in jobs.items():
        run_jobs(wanted, processes)
    return folder


@grid("layout,objective", CELLS)
def test_layout_equals_one_process(runs: Path, layout: str, objective: str, record_property) -> None:
    difference, where = largest_difference(runs / layout / objective, runs / "one" / objective)
    record_property("largest relative difference", difference)
    assert difference < 1e-4, where

    if objective == "penalty-dpo":
        for name in (layout, "one"):
            first = read_metrics(runs / name / objective)["train", "", 1]
            assert first["loss/preference"] == pytest.approx(math.log(2), abs=2e-6)
            assert first["rewards/accuracies"] == 0.5
            assert first["spo/both_down"] == 0
