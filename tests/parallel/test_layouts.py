"""Every layout gives the numbers of one process; the reference cache made in one layout serves all."""

import math
from pathlib import Path

import pytest

from tests.support.processes import largest_difference, read_metrics, run_jobs
from tests.support.tiny import arithmetic_pairs, tiny_model, write_jsonl

LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2-sp": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "dp2": (2, []),
    "pp2-uneven": (2, ["parallel.pipeline=2", "parallel.layers_per_stage=[3,1]", "parallel.recompute=selective"]),
    "pp2-vpp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "dp2-overlap": (2, ["parallel.overlap=true", "parallel.recompute=full"]),
    "cp2": (2, ["parallel.context=2"]),
    "cp2-tp2-sp": (4, ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true"]),
    "cp2-pp2": (4, ["parallel.context=2", "parallel.pipeline=2", "parallel.recompute=full"]),
    "cp2-dp2": (4, ["parallel.context=2", "parallel.overlap=true"]),
    "tp2-pp2-vpp2-sp": (
        4,
        ["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.sequence=true"],
    ),
    "dp2-pp2-vpp2-overlap": (4, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.overlap=true"]),
    "tp2-pp2-sp": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "dp2-pp2": (4, ["parallel.pipeline=2"]),
    "dp2-tp2": (4, ["parallel.tensor=2"]),
}
TIED = ["model.path={folder}/tied", "reference.cache={folder}/tied-cache"]
"""A Qwen3 (query and key norms) with tied embeddings and a vocabulary that no layout divides, in place of the Llama."""
OBJECTIVES = {
    "dpo-penalty": ["loss.name=dpo"],
    "simpo-token-tied": ["loss.name=simpo", "spo.lambda_unit=token", "spo.lambda=5", *TIED],
    "alpha-dual": ["loss.name=alpha_dpo", "spo.schedule=dual", "spo.lambda_unit=token"],
    "ipo-alternating-tied": ["loss.name=ipo", "spo.schedule=alternating", *TIED],
    "dpo-pair-small-rows": ["loss.name=dpo", "spo.constraint=pair", "data.row_length=32"],
    "sft": ["spo.schedule=sft"],
}
ON_LAYOUT = {  # each objective in at least two layouts, each layout with at least three objectives
    "tp2": ["dpo-penalty", "alpha-dual", "sft"],
    "tp2-sp": ["simpo-token-tied", "ipo-alternating-tied", "dpo-pair-small-rows"],
    "pp2": ["dpo-penalty", "simpo-token-tied", "dpo-pair-small-rows"],
    "dp2": ["dpo-penalty", "alpha-dual", "ipo-alternating-tied"],
    "pp2-uneven": ["dpo-penalty", "simpo-token-tied", "sft"],
    "pp2-vpp2": ["dpo-penalty", "ipo-alternating-tied", "dpo-pair-small-rows"],
    "dp2-overlap": ["dpo-penalty", "alpha-dual", "simpo-token-tied"],
    "cp2": ["dpo-penalty", "alpha-dual", "simpo-token-tied", "sft"],
    "cp2-tp2-sp": ["dpo-penalty", "ipo-alternating-tied", "dpo-pair-small-rows"],
    "cp2-pp2": ["dpo-penalty", "simpo-token-tied", "alpha-dual"],
    "cp2-dp2": ["dpo-penalty", "ipo-alternating-tied", "dpo-pair-small-rows"],
    "tp2-pp2-vpp2-sp": ["dpo-penalty", "simpo-token-tied", "dpo-pair-small-rows"],
    "dp2-pp2-vpp2-overlap": ["dpo-penalty", "alpha-dual", "dpo-pair-small-rows"],
    "tp2-pp2-sp": ["dpo-penalty", "alpha-dual", "dpo-pair-small-rows"],
    "dp2-pp2": ["simpo-token-tied", "dpo-penalty", "sft"],
    "dp2-tp2": ["dpo-penalty", "ipo-alternating-tied", "simpo-token-tied"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all objectives in one process, and of the table above in every layout."""
    folder = tmp_path_factory.mktemp("layouts")
    tiny_model(folder / "model")
    tiny_model(folder / "tied", "qwen3", tie_word_embeddings=True, vocab_size=301)
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(22))
    write_jsonl(folder / "held-out.jsonl", arithmetic_pairs(7, seed=1))
    config = folder / "config.yaml"
    config.write_text(
        f"""
output: {folder}/unset
model: {{path: {folder}/model}}
data: {{train: {folder}/pairs.jsonl, eval: {folder}/held-out.jsonl, max_length: 64}}
reference: {{cache: {folder}/cache}}
optimizer: {{lr: 1e-3, warmup_steps: 2, weight_decay: 0.01}}
precision: {{dtype: fp32}}
training: {{global_batch_size: 8, steps: 5, eval_every: 3}}
logging: {{progress: false}}
"""
    )

    def settings(objective: str) -> list[str]:
        return [override.format(folder=folder) for override in OBJECTIVES[objective]]

    def train(name: str, layout: list[str]) -> list[tuple[str, str, list[str]]]:
        wanted = ON_LAYOUT.get(name, list(OBJECTIVES))
        return [
            ("train", str(config), [f"output={folder}/{name}/{objective}", *settings(objective), *layout])
            for objective in wanted
        ]

    for processes in (2, 1, 4):  # the cache is made at TP2
        layouts = {name: layout for name, (count, layout) in LAYOUTS.items() if count == processes}
        if processes == 1:
            layouts = {"one": []}
        jobs = [job for name, layout in layouts.items() for job in train(name, layout)]
        if processes == 2:
            for overrides in ([], [override.format(folder=folder) for override in TIED]):
                jobs.insert(0, ("reference", str(config), ["parallel.tensor=2", *overrides]))
        run_jobs(jobs, processes)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "objective"), [(n, o) for n, wanted in ON_LAYOUT.items() for o in wanted])
def test_layout_equals_one_process(runs: Path, layout: str, objective: str) -> None:
    difference, where = largest_difference(runs / layout / objective, runs / "one" / objective)
    assert difference < 1e-4, where


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
def test_first_step_of_dpo_is_ln_2(runs: Path, layout: str) -> None:
    if "dpo-penalty" in ON_LAYOUT.get(layout, OBJECTIVES):
        first = read_metrics(runs / layout / "dpo-penalty")["train", "", 1]
        assert first["loss/preference"] == pytest.approx(math.log(2), abs=2e-6)
        assert first["rewards/accuracies"] == 0.5
        assert first["spo/both_down"] == 0
