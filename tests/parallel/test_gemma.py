"""Gemma's special parts and sliding windows give the numbers of one process in every kind of layout."""

from pathlib import Path

import pytest

from tests.support.grids import grid, layout_settings, selected
from tests.support.processes import Job, largest_difference, run_jobs
from tests.support.tiny import tiny_model, tiny_run

LAYOUTS = {
    "tp2": ["parallel.tensor=2"],
    "tp2-sp": ["parallel.tensor=2", "parallel.sequence=true", "parallel.recompute=selective"],
    "pp2": ["parallel.pipeline=2"],
    "pp2-vpp2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.recompute=full"],
    "cp2": ["parallel.context=2"],
    "dp2": ["data.row_length=32"],
}
OBJECTIVES = {
    "gemma2": ["model.path={folder}/gemma2"],
    "gemma3": ["model.path={folder}/gemma3_text"],
    "gemma3-lora": ["model.path={folder}/gemma3_text", "lora.rank=2", "reference.cache=null"],
    "mistral": ["model.path={folder}/mistral"],
}
CELLS = {
    (layout, objective): [*layout_settings(2, LAYOUTS[layout]), *OBJECTIVES[objective], objective]
    for layout in LAYOUTS
    for objective in OBJECTIVES
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    tiny_model(folder / "gemma2", "gemma2", tie_word_embeddings=True, vocab_size=301)
    layers = ["sliding_attention", "full_attention"] * 2
    tiny_model(folder / "gemma3_text", "gemma3_text", tie_word_embeddings=True, layer_types=layers)
    tiny_model(folder / "mistral", "mistral", sliding_window=8)
    config = tiny_run(
        folder,
        pairs=22,
        held_out=5,
        model={"path": f"{folder}/gemma2"},
        data={"max_length": 48},
        reference=None,
        optimizer={"weight_decay": 0.01},
        training={"steps": 3, "eval_every": 2},
    )
    cells = selected(request, "layout", "objective")
    two, one = list[Job](), list[Job]()
    for objective in sorted({objective for _, objective in cells}):
        overrides = [override.format(folder=folder) for override in OBJECTIVES[objective]]
        model = [f"reference.cache={folder}/cache-{objective}", *overrides]
        if "lora.rank=2" not in model:
            two.append(("reference", str(config), [*model, "parallel.tensor=2"]))
        for layout in sorted(layout for layout, wanted in cells if wanted == objective):
            two.append(("train", str(config), [f"output={folder}/{layout}/{objective}", *model, *LAYOUTS[layout]]))
        one.append(("train", str(config), [f"output={folder}/one/{objective}", *model]))
    run_jobs(two, 2)
    run_jobs(one, 1)
    return folder


@grid("layout,objective", CELLS)
def test_layout_equals_one_process(runs: Path, layout: str, objective: str) -> None:
    difference, where = largest_difference(runs / layout / objective, runs / "one" / objective)
    assert difference < 1e-4, where
