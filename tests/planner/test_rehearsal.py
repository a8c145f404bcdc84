"""Rehearsal of layouts without their processes, and the faults that it finds."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_spo.config.load import load_config
from megatron_spo.config.schema import Config
from megatron_spo.errors import UserError
from megatron_spo.planner.parameters import stage_parameters
from megatron_spo.planner.presets import PRESETS, shape_of
from tests.planner.counted import CONFIG
from tests.support.processes import ROOT, launch

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama-8b-uneven": ("Llama-3.1-8B", 12, {"tensor": 2, "pipeline": 3, "sequence": True}),
    "qwen3-32b-vpp": ("Qwen3-32B", 16, {"tensor": 4, "pipeline": 4, "virtual_pipeline": 4, "sequence": True}),
    "qwen2.5-72b-cp": ("Qwen2.5-72B", 16, {"tensor": 8, "context": 2, "sequence": True}),
    "mixtral-ep": ("Mixtral-8x7B", 16, {"tensor": 2, "pipeline": 2, "expert": 4, "sequence": True}),
    "mixtral-cut": ("Mixtral-8x7B", 4, {"tensor": 4, "sequence": True}),
    "qwen3-235b": ("Qwen3-235B-A22B", 64, {"tensor": 4, "pipeline": 2, "expert": 32, "sequence": True}),
}
LAYERS = {"llama-8b-uneven": 8, "qwen3-32b-vpp": 16, "qwen3-235b": 2}
"""Layers of the shortened models where 4 are not enough, or too expensive."""


@pytest.mark.slow
def test_the_70b_of_the_example() -> None:
    config = str(ROOT / "examples" / "llama3_70b" / "config.yaml")
    done = launch(["-m", "megatron_spo", "rehearse", config, "--gpus", "32", "--pairs", "2000", "--every-rank"], 1)
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = {line[:32].strip(): line[32:].split()[0] for line in done.stdout.splitlines() if line[32:].split()}
    assert numbers["Hugging Face tensors"] == "723"
    assert numbers["numbers in them"] == "70,553,706,496"
    assert numbers["most parameters of a rank"] == "2,401,935,360"


@pytest.fixture(scope="module", params=["shortened", pytest.param("whole", marks=pytest.mark.slow)])
def rehearsed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Faults and counts of each case, and the faults after one reading was spoilt; in a process of its own."""
    out = tmp_path_factory.mktemp("rehearsed") / "out.json"
    whole = request.param == "whole"
    cases = {name: (*case, None if whole else LAYERS.get(name, 4)) for name, case in CASES.items()}
    done = launch([str(Path(__file__).with_name("rehearse_cases.py")), str(out), json.dumps(cases)], 1)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_read_once_and_no_rank_holds_more_than_planned(rehearsed: dict[str, Any], name: str) -> None:
    found = rehearsed[name]
    assert (found["faults"], found["ranks"]) == ([], CASES[name][1])
    assert found["numbers"] == found["parameters"]  # tests below: as published for the whole models


@pytest.mark.parametrize(
    ("spoilt", "told"),
    [
        ("dropped", "numbers are read"),
        ("doubled", "is read twice"),
        ("shifted", "one replica reads a different part"),
        ("stranger", "number of ranks that read it, by pipeline stage"),
        ("shard", "checkpoint: "),
        ("parameters", "parameters, but the plan"),
    ],
)
def test_what_is_wrong_is_found(rehearsed: dict[str, Any], spoilt: str, told: str) -> None:
    assert any(told in fault for fault in rehearsed["spoilt"][spoilt]), rehearsed["spoilt"][spoilt]


BILLIONS = {  # parameters from the model cards; for Gemma 3 of the text model
    "Gemma-2-27B": 27.2,
    "Gemma-2-9B": 9.24,
    "Gemma-3-12B": 11.8,
    "Gemma-3-27B": 27.0,
    "Llama-3.1-8B": 8.03,
    "Llama-3.3-70B": 70.6,
    "Mixtral-8x22B": 141,
    "Mixtral-8x7B": 46.7,
    "Qwen2.5-72B": 72.7,
    "Qwen3-235B-A22B": 235,
    "Qwen3-30B-A3B": 30.5,
    "Qwen3-32B": 32.8,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_of_their_models(name: str) -> None:
    one_rank = stage_parameters(Config.model_validate(CONFIG), shape_of(name), 0)
    assert one_rank.held / 1e9 == pytest.approx(BILLIONS[name], rel=0.005)


def test_presets_are_found_by_hub_ids() -> None:
    assert shape_of("google/gemma-3-27b-it") == shape_of("Gemma-3-27B")
    assert shape_of("meta-llama/Llama-3.3-70B-Instruct") == shape_of("Llama-3.3-70B")
    assert shape_of("meta-llama/Meta-Llama-3.1-8B") == shape_of("llama-3.1-8b")
    with pytest.raises(UserError, match="nobody/model.*--model"):
        shape_of("nobody/model")


def test_row_plan_counts_every_pair_once() -> None:
    from megatron_spo.planner.rows import assumed_lengths
    from megatron_spo.rehearsal.weights import rehearse_rows

    layout = ["parallel.tensor=8", "parallel.pipeline=2", "parallel.virtual_pipeline=null"]  # two replicas
    config = load_config(ROOT / "examples" / "llama3_70b" / "config.yaml", layout, elsewhere=True)
    found = rehearse_rows(config, assumed_lengths(100, 200, 1000, 2048), ranks=2)
    assert found["steps"] == 8 and 0.8 < found["fill"] <= 1 <= found["most over mean work of a rank"] < 1.1
    too_long = assumed_lengths(100, 200, 10, 2048)
    too_long.rejected_tail[3] = 5000
    with pytest.raises((UserError, ValueError), match="5[0-9]{3} tokens"):
        rehearse_rows(config, too_long, ranks=2)
