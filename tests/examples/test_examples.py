"""The example configurations load, the pages agree with the numbers, and both examples run in miniature."""

import json
from pathlib import Path
from typing import Any

import pytest

from examples.common import StageFailed
from examples.gsm8k import run as gsm8k
from examples.quickstart import page, run, task
from examples.studies import prepare_gsm8k
from megatron_spo.config.load import load_config

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("module", [run, gsm8k])
def test_configs_load_with_every_variant(module) -> None:
    assert load_config(module.HERE / "sft.yaml").spo.schedule == "sft"
    assert load_config(module.HERE / "preference.yaml").spo.schedule == "penalty"
    for name, overrides in module.VARIANTS.items():
        config = load_config(module.HERE / "preference.yaml", overrides)
        assert name in ("sft_on_chosen", config.loss.name, f"{config.loss.name}+spo")
        assert (config.spo.schedule == "penalty") == name.endswith("+spo")


def rows_with(**changes: dict) -> list[dict]:
    numbers = {"accuracy": 0.9, "accuracy_t1": 0.8, "malformed": 0.01, "preferred": 0.4, "win": 0.3}
    shifts = {"chosen_shift": 0.0, "rejected_shift": -1.0, "seconds": 1.0}
    rows: list[dict[str, Any]] = [{"name": name, **numbers, **shifts} for name in ("sft", *run.VARIANTS)]
    return [{**row, **changes.get(row["name"].replace("+", "_"), {})} for row in rows]


def test_sentences_follow_the_numbers() -> None:
    greedy = dict.fromkeys(("sft", *run.VARIANTS), 0.5)
    as_expected = rows_with(
        sft_on_chosen={"win": 0.6, "accuracy": 0.95},
        dpo={"win": 0.2, "accuracy": 0.25},
        **{f"{loss}_spo": {"win": 0.7} for loss in run.LOSSES},
    )
    text = "\n".join(page.verdict(as_expected, greedy))
    assert "dpo 0.250" in text and "all of them win more than the loss alone" in text
    assert "all of them more than the control" in text and "0.950, above the best with SPO" in text
    otherwise = rows_with(sft_on_chosen={"win": 0.6, "accuracy": 0.5}, simpo_spo={"win": 0.7})
    text = "\n".join(page.verdict(otherwise, greedy))
    assert "simpo+spo win more than the loss alone" in text and "simpo+spo more than the control" in text
    assert "0.500, not above the best with SPO" in text
    assert "none of them more than the control" in "\n".join(page.verdict(rows_with(), greedy))


def test_gsm8k_splits_by_problem(tmp_path: Path) -> None:
    stages, pairs, solved = gsm8k_inputs(tmp_path)
    scale = gsm8k.Scale(vocabulary=300, held_out_problems=5)
    gsm8k.write_data(stages, pairs, solved, scale, seed=1)
    sides = {name: gsm8k.read_jsonl(stages.file(name)) for name in ("sft", "pairs", "pairs_heldout")}
    prompts = {name: {row["prompt"] for row in rows} for name, rows in sides.items()}
    assert len(prompts["pairs_heldout"]) == 5 and len(sides["pairs_heldout"]) == 10
    assert not prompts["pairs_heldout"] & (prompts["pairs"] | prompts["sft"])
    assert len(sides["pairs"]) == 30
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p"}\n')
    with pytest.raises(StageFailed, match="bad.jsonl line 1: the fields"):
        gsm8k.write_data(stages, tmp_path / "bad.jsonl", solved, scale, seed=1)
    with pytest.raises(StageFailed, match="nowhere does not exist"):
        gsm8k.write_data(stages, pairs, tmp_path / "nowhere", scale, seed=1)


def test_the_gsm8k_study_says_which_file_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pairs.jsonl").write_text("")
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "data"), "0", str(tmp_path / "pairs.jsonl"), "nowhere"])
    with pytest.raises(StageFailed, match="nowhere is not there: examples/studies/README.md"):
        prepare_gsm8k.main()
    assert not (tmp_path / "data").exists()


def test_the_gsm8k_study_s_problems_have_no_pair_to_train_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, pairs, _ = gsm8k_inputs(tmp_path)
    given = gsm8k.read_jsonl(pairs)
    gsm8k.write_jsonl(stages.file("pairs"), given[:30])  # of the first 15 problems
    monkeypatch.setattr(prepare_gsm8k, "PROBLEMS", 5)
    prepare_gsm8k.write_problems(stages, pairs, seed=0)
    drawn = gsm8k.read_jsonl(stages.file("test_problems"))
    assert {row["prompt"] for row in drawn} == {row["prompt"] for row in given[30:]}
    assert all({"chosen": row["chosen"], "prompt": row["prompt"]} == row for row in drawn) and len(drawn) == 5


def gsm8k_inputs(folder: Path) -> tuple[gsm8k.Stages, Path, Path]:
    """Returns the files of twenty problems with two pairs each, and of SFT rows with twenty more problems."""
    problems = [f"Tom has {i} apples and buys {i + 1}. How many are there?" for i in range(40)]
    pairs = [
        {"prompt": p, "chosen": f"It is {2 * i + 1}.", "rejected": f"It may be {i}{k}."}
        for i, p in enumerate(problems[:20])
        for k in range(2)
    ]
    solved = [{"prompt": p, "completion": f"{i}+{i + 1}={2 * i + 1}"} for i, p in enumerate(problems)]
    stages = gsm8k.Stages.open(folder / "out", 2, {}, fresh=False)
    gsm8k.write_jsonl(folder / "pairs.jsonl", pairs)
    gsm8k.write_jsonl(folder / "sft.jsonl", solved)
    return stages, folder / "pairs.jsonl", folder / "sft.jsonl"


@pytest.mark.slow
def test_quickstart_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = task.preference_pairs

    def with_worked_answers(rows, *rest):
        """Replaces samples by worked answers, because a model trained for four steps never answers right."""
        return judge([{**row, **worked(row["prompt"])} for row in rows], *rest)

    def worked(prompt: str) -> dict:
        problem = task.Problem.from_prompt(prompt)
        return {"responses": [task.solution(problem, style) for style in task.COLUMNS], "finished": [True, True]}

    monkeypatch.setattr(task, "preference_pairs", with_worked_answers)
    monkeypatch.setattr(run, "VARIANTS", {name: run.VARIANTS[name] for name in ("sft_on_chosen", "dpo", "dpo+spo")})
    out = tmp_path / "out"
    scale = run.Scale(
        sft_problems=20, sft_steps=4, sft_warmup=1, pair_problems=6, held_out_problems=3, samples=2, pairs=4,
        held_out_pairs=2, steps=2, warmup=1, eval_every=1, test_problems=8,
    )  # fmt: skip
    run.main(["--out", str(out)], scale)
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["sft", "sft_on_chosen", "dpo", "dpo+spo"]
    assert set(rows[0]) == {"name", *run.COLUMNS}
    assert rows[0]["chosen_shift"] == 0 and all(row["chosen_shift"] != 0 for row in rows[1:])
    assert "<svg" in (out / "index.html").read_text() and "<svg" in (out / "displacement.svg").read_text()
    written = {path: path.stat().st_mtime_ns for path in out.glob("*-t1.jsonl")}
    run.main(["--out", str(out)], scale)  # everything is already done
    assert written == {path: path.stat().st_mtime_ns for path in out.glob("*-t1.jsonl")}


@pytest.mark.slow
def test_gsm8k_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pairs, solved = gsm8k_inputs(tmp_path)
    out = tmp_path / "run"
    monkeypatch.setattr(gsm8k, "VARIANTS", {name: gsm8k.VARIANTS[name] for name in ("sft_on_chosen", "simpo+spo")})
    scale = gsm8k.Scale(300, sft_steps=2, sft_warmup=1, steps=2, warmup=1, eval_every=1, held_out_problems=5)
    gsm8k.main([str(pairs), str(solved), "--out", str(out)], scale)
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["sft", "sft_on_chosen", "simpo+spo"]
    assert all(row["pairs"] == 10 and 0 <= row["both_down"] <= 1 for row in rows)
    assert "<svg" in (out / "index.html").read_text()
