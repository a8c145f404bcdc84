"""A mixture of experts: every layout gives the numbers of one process, and checkpoints move between them."""

from pathlib import Path

import pytest

from tests.support.processes import largest_difference, run_jobs
from tests.support.tiny import arithmetic_pairs, tiny_model, write_jsonl

SP = ["parallel.tensor=2", "parallel.sequence=true"]
EP = ["parallel.expert=2"]
LAYOUTS = {
    "ep2": (2, EP),
    "ep2-overlap-recompute": (2, [*EP, "parallel.overlap=true", "parallel.recompute=full"]),
    "ep2-cp2": (2, [*EP, "parallel.context=2"]),
    "ep2-tp2-sp": (2, [*EP, *SP]),
    "tp2-sp": (2, SP),
    "pp2-vpp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "ep4-tp2-sp": (4, ["parallel.expert=4", *SP]),
    "ep2-dp4": (4, EP),
    "ep2-pp2": (4, [*EP, "parallel.pipeline=2"]),
    "ep2-tp2-sp-pp2": (4, [*EP, *SP, "parallel.pipeline=2"]),
}
AUX = ["model.freeze_router=false", "model.router_aux_loss=0.05"]
MIXTRAL = ["model.path={folder}/mixtral", "reference.cache={folder}/mixtral-cache"]
OBJECTIVES = {
    "dpo-penalty": ["loss.name=dpo", "model.freeze_router=false"],
    "frozen-dual": ["loss.name=alpha_dpo", "spo.schedule=dual", "spo.lambda_unit=token"],
    "aux-mixtral": ["loss.name=dpo", "data.row_length=48", *AUX, *MIXTRAL],
    "aux-barrier": ["loss.name=dpo", "spo.schedule=barrier", "spo.barrier_rate=40", *AUX],
    "lookahead-mixtral": ["loss.name=simpo", "spo.schedule=lookahead", "spo.lookahead_lr=0.05", *AUX, *MIXTRAL],
}
ON_LAYOUT = {
    "ep2": list(OBJECTIVES),
    "ep2-overlap-recompute": ["aux-mixtral", "frozen-dual"],
    "ep2-cp2": ["dpo-penalty", "aux-mixtral"],
    "ep2-tp2-sp": ["dpo-penalty", "aux-barrier", "lookahead-mixtral"],
    "tp2-sp": ["aux-mixtral", "aux-barrier"],
    "pp2-vpp2": ["aux-mixtral"],
    "ep4-tp2-sp": ["aux-barrier", "aux-mixtral"],
    "ep2-dp4": ["dpo-penalty"],
    "ep2-pp2": ["dpo-penalty", "aux-barrier"],
    "ep2-tp2-sp-pp2": ["aux-mixtral"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    tiny_model(folder / "model", "qwen3_moe")
    tiny_model(folder / "mixtral", "mixtral")
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(22))
    write_jsonl(folder / "held-out.jsonl", arithmetic_pairs(7, seed=1))
    config = folder / "config.yaml"
    config.write_text(
        f"""
output: {folder}/unset
model: {{path: {folder}/model}}
data: {{train: {folder}/pairs.jsonl, eval: {folder}/held-out.jsonl, max_length: 48}}
reference: {{cache: {folder}/cache}}
optimizer: {{lr: 1e-3, warmup_steps: 2, weight_decay: 0.01}}
precision: {{dtype: fp32}}
training: {{global_batch_size: 8, steps: 3, eval_every: 2}}
logging: {{progress: false}}
"""
    )

    def train(name: str, layout: list[str]) -> list[tuple[str, str, list[str]]]:
        settings = {
            objective: [override.format(folder=folder) for override in OBJECTIVES[objective]]
            for objective in ON_LAYOUT.get(name, list(OBJECTIVES))
        }
        return [
            ("train", str(config), [f"output={folder}/{name}/{objective}", *overrides, *layout])
            for objective, overrides in settings.items()
        ]

    for processes in (2, 1, 4):  # the cache is made at EP2, by ranks of which one has nothing to score
        layouts = {name: layout for name, (count, layout) in LAYOUTS.items() if count == processes}
        jobs = [job for name, layout in (layouts or {"one": []}).items() for job in train(name, layout)]
        if processes == 2:
            mixtral = [override.format(folder=folder) for override in MIXTRAL]
            jobs[:0] = [("reference", str(config), [*EP, *more]) for more in ([], mixtral)]
        run_jobs(jobs, processes)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "objective"), [(n, o) for n, wanted in ON_LAYOUT.items() for o in wanted])
def test_layout_equals_one_process(runs: Path, layout: str, objective: str) -> None:
    difference, where = largest_difference(runs / layout / objective, runs / "one" / objective)
    assert difference < 1e-4, where
