"""The table before the start of a study, scales, own names in placeholders, and the order of the runs."""

from pathlib import Path
from typing import Any

import pytest

from megatron_spo.cli import main
from megatron_spo.config.load import load_config
from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.planner.gpus import find_gpu
from megatron_spo.scaling.estimate import estimates
from megatron_spo.scaling.study import interleaved, read_study
from tests.scaling.test_study import write_study
from tests.support.tiny import tiny_model

SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 16, "intermediate_size": 32},
    "large": {"num_hidden_layers": 3},
}


def test_a_name_of_its_own_with_plain_values(folder: Path) -> None:
    spec: dict[str, Any] = {
        "vary": {"pairs": [8, 16], "optimizer.lr": [1e-4]},
        "set": {"data.rows": "{pairs}", "reference.cache": "{out}/cache-{pairs}-{scale}"},
        "before": [{"name": "note-{pairs}", "run": "echo {pairs} {scale}"}],
    }
    study = read_study(write_study(folder, "own", **spec))
    assert [run.choices["pairs"] for run in study.runs] == [8, 16]
    config = load_config(study.base, list(study.runs[1].overrides), elsewhere=True)
    assert config.data.rows == 16
    assert config.reference.cache == f"{folder}/own/cache-16-full"
    assert study.runs[0].before[0].words == ("echo", "8", "full")


def test_a_scale_replaces_what_it_names(folder: Path) -> None:
    spec: dict[str, Any] = {
        "models": {"like": str(folder / "model"), "sizes": SIZES},
        "set": {"model.path": "{out}/models/{model}", "training.steps": 50, "optimizer.lr": 1e-4},
        "vary": {"spo.lambda": [0.5, 1.0, 2.0], "training.seed": [0, 1]},
        "scales": {"tiny": {"set": {"training.steps": 2}, "vary": {"spo.lambda": [1.0]},
                            "models": {"sizes": {"small": SIZES["small"]}}}},
    }  # fmt: skip
    path = write_study(folder, "scaled", **spec)
    assert len(read_study(path).runs) == 12
    study = read_study(path, "tiny")
    assert study.out == folder / "scaled-tiny"
    assert [dict(run.choices) for run in study.runs] == [
        {"model": "small", "spo.lambda": 1.0, "training.seed": seed} for seed in (0, 1)
    ]
    config = load_config(study.base, list(study.runs[0].overrides), elsewhere=True)
    assert (config.training.steps, config.optimizer.lr) == (2, 1e-4)
    assert config.model.path == f"{folder}/scaled-tiny/models/small"


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ({"vary": {"lr": [1, 2]}}, [], "vary: lr is not a key of the configuration (keys have a section, such as"),
        ({"vary": {"spo.lambda": [1]}}, ["--scale", "tiny"], "--scale tiny is not a scale of"),
        (
            {"vary": {"spo.lambda": [1]}, "scales": {"a": {"vari": {}}}},
            ["--scale", "a"],
            "vari: unknown key; did you mean 'vary'?",
        ),
        ({"vary": {"spo.lambda": [1]}, "scales": [1]}, [], "scales: must map names"),
        ({"vary": {"spo.lambda": [1]}}, ["--list", "--gpu", "h999"], "--gpu h999 is not one of"),
        ({"vary": {"spo.lambda": [1]}}, ["--list", "--gpus", "0"], "--gpus 0 must be at least 1"),
        ({"vary": {"data.rows": [33]}}, ["--list"], "data.rows = 33, but "),
    ],
)
def test_what_is_wrong_is_said(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    spec: dict[str, Any],
    options: list[str],
    said: str,
) -> None:
    assert main(["scaling", "study", str(write_study(folder, "wrong", **spec)), *options]) == 2
    assert said in capsys.readouterr().err


def test_the_table_before_the_start(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec: dict[str, Any] = {
        "models": {"like": str(folder / "model"), "sizes": SIZES},
        "set": {"model.path": "{out}/models/{model}", "training.steps": "{steps}"},
        "vary": {"data.rows": [8, 32], "steps": [5]},
    }
    path = write_study(folder, "before", **spec)
    assert main(["scaling", "study", str(path), "--list", "--gpu", "h100", "--gpus", "2"]) == 0
    said = capsys.readouterr().out
    assert not (folder / "before").exists()  # nothing is written
    assert "sum of 4" in said and "GPU hours" in said and "on 2 x h100" in said
    study = read_study(path)
    found = estimates(study, study.runs, find_gpu("h100", {}), 1)
    small, large = found[1], found[4]
    tiny_model(folder / "counted", **SIZES["large"])
    assert large.n == read_model_shape(folder / "counted").parameters > small.n
    assert small.steps == large.steps == 5
    assert small.d == pytest.approx(2.5 * small.u)  # 5 steps of 4 pairs, of 8 different ones
    assert large.u == large.d  # of 32 different ones
    assert large.flops > 6 * (large.n - 2 * 32 * 256) * large.d * 0.5
    capsys.readouterr()
    assert main(["scaling", "study", str(path), "--list"]) == 0
    assert "on this CPU" in capsys.readouterr().out


def test_estimates_without_model_and_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec: dict[str, Any] = {
        "vary": {"spo.lambda": [1.0, 2.0]},
        "set": {"model.path": "nowhere", "data.train": "nowhere.jsonl", "training.steps": None, "training.epochs": 1},
    }
    assert main(["scaling", "study", str(write_study(folder, "unknown", **spec)), "--list"]) == 0
    assert "2 runs are not known yet" in capsys.readouterr().out
    spec["expected"] = {"prompt": 10, "response": 20, "pairs": 100, "model": str(folder / "model")}
    study = read_study(write_study(folder, "unknown", **spec))
    found = estimates(study, study.runs, find_gpu("h100", {}), 1)[1]
    assert (found.steps, found.d, found.u) == (25, 5000, 5000)  # an epoch of 100 pairs of 50 tokens


def test_runs_start_with_different_shared_commands(folder: Path) -> None:
    spec: dict[str, Any] = {
        "models": {"like": str(folder / "model"), "sizes": SIZES},
        "set": {"model.path": "{out}/models/{model}"},
        "vary": {"spo.lambda": [1.0, 2.0, 3.0]},
        "before": [
            {"name": "data", "run": "true"},
            {"name": "sft-{model}", "run": "true"},
            {"name": "reference-{model}-{spo.lambda}", "run": "true"},
        ],
    }
    runs = read_study(write_study(folder, "order", **spec)).runs
    assert [run.number for run in interleaved(runs)] == [1, 4, 2, 5, 3, 6]
