"""Monitoring gives the same results in every layout: alarms, raised lambda, held-out pairs, answers."""

import json
from pathlib import Path

import pytest

from tests.support.grids import selected
from tests.support.processes import largest_difference, read_metrics, run_jobs
from tests.support.tiny import tiny_run

LAYOUTS = {
    "dp2": [],
    "tp2-sp": ["parallel.tensor=2", "parallel.sequence=true"],
    "pp2-vpp2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "cp2": ["parallel.context=2"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("watching")
    config = tiny_run(
        folder,
        pairs=24,
        held_out=7,
        loss={"name": "dpo", "beta": 0.5},
        spo={"schedule": "penalty", "lambda": 0.001},
        optimizer={"lr": 3e-3},
        training={"eval_every": 2},
        monitor={"chosen_fall": 0.001, "on_alarm": "raise_lambda", "generate_every": 4, "generate_prompts": 3},
    )
    wanted = {name: LAYOUTS[name] for (name,) in sorted(selected(request, "layout"))}
    for processes, layouts in ((1, {"one": []}), (2, wanted)):
        jobs = []
        for name, layout in layouts.items():
            given = [f"output={folder}/{name}", f"reference.cache={folder}/cache-{name}", *layout]
            jobs += [("reference", str(config), given), ("train", str(config), given)]
        run_jobs(jobs, processes, cold=processes == 2)  # with torchrun, so each rank has its own hash seed
    return folder


@pytest.mark.parametrize(
    "layout", ["dp2", "pp2-vpp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2-sp", "cp2"))]
)
def test_layout_equals_one_process(folder: Path, layout: str) -> None:
    lines = read_metrics(folder / "one")
    assert any(kind == "alarm" for kind, *_ in lines) and ("generation", "held-out", 4) in lines
    assert lines["train", "", 4]["spo/lambda"] > 0.001
    difference, where = largest_difference(folder / layout, folder / "one")
    assert difference < 1e-4, where
    ours, expected = (json.loads((folder / n / "held_out/held-out.json").read_text()) for n in (layout, "one"))
    for got, wanted in zip(ours["pairs"], expected["pairs"], strict=True):
        assert got == pytest.approx(wanted, abs=1e-3)
    assert [one["prompt"] for one in ours["worst"]] == [one["prompt"] for one in expected["worst"]]
    assert (folder / layout / "samples.jsonl").read_text() == (folder / "one/samples.jsonl").read_text()
