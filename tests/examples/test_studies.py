"""The prepared studies: every run's configuration loads, and the scores are those of the quickstart."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from examples.common import StageFailed, Stages, read_jsonl
from examples.quickstart import task
from examples.studies import prepare_gsm8k, score, summary
from examples.studies.code import task as programs
from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.scaling.study import check_configurations, read_study
from tests.support.tiny import write_jsonl

ROOT = Path(__file__).parents[2]
RUNS = {"losses": 60, "lambda_units": 48, "lambda_sizes": 24, "lambda_lengths": 16, "lambda_steps_pairs": 36,
        "schedules": 33, "stability": 48, "code": 15, "gsm8k": 66, "long": 3, "sizes_data": 32, "sft_data": 42,
        "sizes_lambda": 48, "repeats": 48, "overoptimization": 84, "displacement": 180}  # fmt: skip
TINY = {"sizes_data": 32, "sizes_lambda": 24, "repeats": 27, "overoptimization": 20, "displacement": 45, "schedules": 7,
        "sft_data": 14}  # fmt: skip


def test_every_study_has_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = sorted((ROOT / "examples/studies").glob("*.yaml"))
    assert {path.stem for path in files} == set(RUNS)
    for path in files:
        study = read_study(path)
        check_configurations(study)
        assert len(study.runs) == RUNS[path.stem], path
    for name, count in TINY.items():
        study = read_study(ROOT / f"examples/studies/{name}.yaml", "tiny")
        check_configurations(study)
        assert len(study.runs) == count, name
        assert study.out.name == f"{name}-tiny"


def test_the_model_of_the_programs_is_that_of_the_task(tmp_path: Path) -> None:
    programs.write_model(tmp_path)
    kept = ROOT / "examples/studies/code/model"
    assert (kept / "tokenizer.json").read_text() == (tmp_path / "tokenizer.json").read_text()
    assert read_model_shape(kept).parameters == read_model_shape(tmp_path).parameters


def gsm8k_rows() -> tuple[list[dict], list[dict]]:
    """Returns two pairs of each of twenty problems, and SFT rows of these and of twenty more problems."""
    problems = [f"Tom has {i} apples and buys {i + 1}. How many are there?" for i in range(40)]
    pairs = [
        {"prompt": p, "chosen": f"It is {2 * i + 1}.", "rejected": f"It may be {i}{k}."}
        for i, p in enumerate(problems[:20])
        for k in range(2)
    ]
    return pairs, [{"prompt": p, "completion": f"{i}+{i + 1}={2 * i + 1}"} for i, p in enumerate(problems)]


def test_gsm8k_splits_by_problem(tmp_path: Path) -> None:
    stages = Stages.open(tmp_path / "out", 1, {}, fresh=False)
    scale = prepare_gsm8k.Scale(vocabulary=300, held_out_problems=5)
    prepare_gsm8k.write_data(stages, *gsm8k_rows(), scale, seed=1)
    sides = {name: read_jsonl(stages.file(name)) for name in ("sft", "pairs", "pairs_heldout")}
    prompts = {name: {row["prompt"] for row in rows} for name, rows in sides.items()}
    assert len(prompts["pairs_heldout"]) == 5 and len(sides["pairs_heldout"]) == 10
    assert not prompts["pairs_heldout"] & (prompts["pairs"] | prompts["sft"])
    assert len(sides["pairs"]) == 30


def test_the_gsm8k_study_says_what_is_wrong_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "p"}])
    for file, message in (
        ("nowhere", "nowhere does not exist; see examples/studies"),
        (bad, "bad.jsonl line 1: the fields"),
    ):
        monkeypatch.setattr("sys.argv", ["", str(tmp_path / "data"), "0", str(file), "nowhere"])
        with pytest.raises(StageFailed, match=message):
            prepare_gsm8k.main()
    assert not (tmp_path / "data").exists()


def test_the_gsm8k_study_s_problems_have_no_pair_to_train_on(tmp_path: Path) -> None:
    given, _ = gsm8k_rows()
    stages = Stages.open(tmp_path / "out", 1, {}, fresh=False)
    write_jsonl(stages.file("pairs"), given[:30])  # of the first 15 problems
    prepare_gsm8k.write_problems(stages, write_jsonl(tmp_path / "pairs.jsonl", given), 5, seed=0)
    drawn = read_jsonl(stages.file("test_problems"))
    assert {row["prompt"] for row in drawn} == {row["prompt"] for row in given[30:]}
    assert all({"chosen": row["chosen"], "prompt": row["prompt"]} == row for row in drawn) and len(drawn) == 5


@pytest.mark.slow
def test_data_of_the_gsm8k_study_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [str(write_jsonl(tmp_path / f"{i}.jsonl", rows)) for i, rows in enumerate(gsm8k_rows())]
    scale = prepare_gsm8k.Scale(300, 2, 1, held_out_problems=5, test_problems=2, pairs=10)
    monkeypatch.setattr(prepare_gsm8k, "Scale", lambda: scale)
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "data"), "0", *files])
    prepare_gsm8k.main()
    assert (tmp_path / "data" / "sft-hf").is_dir() and len(read_jsonl(tmp_path / "data" / "pairs.jsonl")) == 10
    assert 0 <= json.loads((tmp_path / "data" / "sft_scores.json").read_text())["t0_malformed"] <= 1


def test_scores_of_a_model(tmp_path: Path) -> None:
    for seed, name in enumerate(("model", "other")):
        task.write_model(tmp_path / name)
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / name)).save_pretrained(tmp_path / name)
    (problems,) = task.draw_problems([40], seed=0)
    prompts = write_jsonl(tmp_path / "problems.jsonl", [{"prompt": problem.prompt} for problem in problems])
    found = {}
    for reference in ("model", "other"):
        score.write_scores(tmp_path / "model", tmp_path / reference, prompts, tmp_path / "scores.json", 0, task)
        found[reference] = json.loads((tmp_path / "scores.json").read_text())
    assert set(found["model"]) == {"kl"} | {
        f"t{temperature}_{name}"
        for temperature in ("0", "0.5", "1")
        for name in ("accuracy", "malformed", "preferred", "win")
    }
    assert found["model"]["kl"] == 0
    assert found["other"]["kl"] > 0.5


def test_log_probs_do_not_see_the_padding(tmp_path: Path) -> None:
    task.write_model(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    prompts, answers = [[3, 4, 5], [6, 7]], [[8, 9], [10, 11, 12, 13]]
    together = score.log_probs(model, prompts, answers)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        logs = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        alone = sum(logs[len(prompt) - 1 + j, token].item() for j, token in enumerate(answer))
        assert together[i].item() == pytest.approx(alone, abs=1e-4)


def test_tables_and_the_picture_of_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {f"score/t{t}_{name}": value for t in ("0", "0.5", "1") for name, value in (("accuracy", 1), ("win", 0.5))}
    rows = [
        {"method": method, "training.seed": seed, "state": "done", "eval/spo/chosen_shift": shift + seed, **scores}
        for method, shift in (("dpo", -20.0), ("dpo+spo", 0.5))
        for seed in (0, 1)
    ]
    pd.DataFrame([*rows, {"method": "dpo", "training.seed": 2, "state": "failed"}]).to_csv(tmp_path / "table.csv")

    def printed(*options: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["summary.py", str(tmp_path / "table.csv"), "method", *options])
        summary.main()
        return capsys.readouterr().out.splitlines()

    lines = printed(str(tmp_path / "out.svg"))
    assert lines[0] == "| method | seeds | right, T=0 | win, T=0 | right, T=1 | win, T=1 | d log p chosen |"
    assert lines[2] == "| dpo | 2 | 1.00 | 0.50 | 1.00 | 0.50 | -19.5 [-20.0, -19.0] |"
    assert "<svg" in (tmp_path / "out.svg").read_text()
    assert printed("--show", "eval/spo/chosen_shift")[-1] == "| dpo+spo | 2 | 1.00 [0.50, 1.50] |"
    assert printed("--by", "training.seed", "eval/spo/chosen_shift")[2] == "| dpo | -20.00 | -19.00 |"
