"""A mixture of experts: every layout gives the numbers of one process, and a run can resume in another layout."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_spo.convert.export import to_hf
from tests.support.grids import grid, layout_settings, selected
from tests.support.processes import Job, largest_difference, run_jobs
from tests.support.tiny import arithmetic_pairs, tiny_model, tiny_run, write_jsonl

SP = ["parallel.tensor=2", "parallel.sequence=true"]
EP = ["parallel.expert=2"]
LAYOUTS = {
    "ep2": (2, EP),
    "ep2-recompute": (2, [*EP, "parallel.recompute=full", "data.row_length=96"]),
    "ep2-cp2": (2, [*EP, "parallel.context=2"]),
    "ep2-tp2-sp": (2, [*EP, *SP]),
    "tp2-sp": (2, SP),
    "pp2-vpp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "ep4-dp4": (4, ["parallel.expert=4"]),
    "ep2-tp2-sp-pp2": (4, [*EP, *SP, "parallel.pipeline=2"]),
    "ep2-tp2-sp-dp2": (4, [*EP, *SP]),
}
AUX = ["model.router_aux_loss=0.5"]
MIXTRAL = ["model.path={folder}/mixtral", "reference.cache={folder}/mixtral-cache"]
OBJECTIVES = {
    "dpo-penalty": ["loss.name=dpo", "model.router_aux_loss=0"],
    "frozen-dual": ["loss.name=alpha_dpo", "spo.schedule=dual", "spo.lambda_unit=token"],
    "aux-mixtral": ["loss.name=dpo", *AUX, *MIXTRAL],
    "aux-barrier": ["loss.name=dpo", "spo.schedule=barrier", "spo.barrier_rate=40", *AUX],
    "aux-lookahead": ["loss.name=simpo", "spo.schedule=lookahead", "spo.lookahead_lr=0.05", *AUX, *MIXTRAL],
    "aux-sft-set": ["loss.name=simpo", "spo.sft_data={folder}/sft.jsonl", "reference.cache=null", *AUX],
    "aux-one-pair": ["loss.name=dpo", "training.global_batch_size=1", *AUX],  # at DP2 one rank has only padding
    "random-sft": ["spo.schedule=sft", "model.init=random", "reference.cache=null"],
}
ON_LAYOUT = {
    "ep2": ["dpo-penalty", "aux-barrier", "aux-one-pair", "random-sft"],
    "ep2-recompute": ["aux-mixtral"],
    "ep2-cp2": ["aux-sft-set"],
    "ep2-tp2-sp": ["aux-barrier", "aux-lookahead"],
    "tp2-sp": ["aux-barrier", "random-sft"],
    "pp2-vpp2": ["aux-mixtral"],
    "ep4-dp4": ["dpo-penalty"],
    "ep2-tp2-sp-pp2": ["aux-mixtral"],
    "ep2-tp2-sp-dp2": ["aux-barrier"],
}
CELLS = {
    (layout, objective): [*layout_settings(*LAYOUTS[layout]), *OBJECTIVES[objective], objective]
    for layout, wanted in ON_LAYOUT.items()
    for objective in wanted
}
MOVED = ["aux-mixtral", "frozen-dual"]
"""Objectives of runs that change the layout between steps: EP2, then one process, then EP2 PP2."""
MOVES = {2: EP, 1: [], 4: [*EP, "parallel.pipeline=2"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    tiny_model(folder / "mixtral", "mixtral")
    sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in arithmetic_pairs(30, seed=2)]
    write_jsonl(folder / "sft.jsonl", sft)
    config = tiny_run(
        folder,
        family="qwen3_moe",
        pairs=22,
        held_out=7,
        data={"max_length": 48},
        optimizer={"weight_decay": 0.01},
        training={"steps": 3, "eval_every": 1},
    )

    def filled(overrides: list[str]) -> list[str]:
        return [override.format(folder=folder) for override in overrides]

    def train(name: str, objective: str, *more: str) -> Job:
        return "train", str(config), [f"output={folder}/{name}/{objective}", *filled(OBJECTIVES[objective]), *more]

    cells = sorted(selected(request, "layout", "objective"))
    alone = {objective for _, objective in cells} | set(MOVED)
    for steps, processes in enumerate((2, 1, 4), 1):  # the cache is filled at EP2, where one rank has no chunk
        jobs = [train(name, wanted, *LAYOUTS[name][1]) for name, wanted in cells if LAYOUTS[name][0] == processes]
        if processes == 1:
            jobs = [train("one", objective) for objective in sorted(alone)]
        jobs += [train("moved", objective, *MOVES[processes], f"training.steps={steps}") for objective in MOVED]
        if processes == 2:
            jobs[:0] = [("reference", str(config), [*EP, *filled(more)]) for more in ([], MIXTRAL)]
        run_jobs(jobs, processes)
    return folder


@grid("layout,objective", CELLS)
def test_layout_equals_one_process(runs: Path, layout: str, objective: str) -> None:
    difference, where = largest_difference(runs / layout / objective, runs / "one" / objective)
    assert difference < 1e-4, where


@pytest.mark.parametrize("objective", MOVED)
def test_moved_run_equals_an_uninterrupted_one(runs: Path, objective: str) -> None:
    difference, where = largest_difference(runs / "moved" / objective, runs / "one" / objective)
    assert difference < 1e-4, where


@pytest.mark.parametrize("layout", ["one", "moved"])
def test_frozen_routers_stay_and_experts_move(runs: Path, layout: str, tmp_path: Path) -> None:
    to_hf(runs / layout / "frozen-dual", tmp_path / "hf")
    before, after = load_file(runs / "model/model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    routers = [name for name in before if name.endswith("mlp.gate.weight")]
    assert len(routers) == 4
    assert all(torch.equal(before[name], after[name]) for name in routers)
    assert not any(torch.equal(before[name], after[name]) for name in before.keys() - set(routers))


@pytest.mark.parametrize(("layout", "objective"), [("ep2", "dpo-penalty")])
def test_trained_routers_move(runs: Path, layout: str, objective: str, tmp_path: Path) -> None:
    to_hf(runs / layout / objective, tmp_path / "hf")
    before, after = load_file(runs / "model/model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert not any(torch.equal(before[name], after[name]) for name in before)
