"""The example configurations load, the pages agree with the numbers, and the quickstart runs in miniature."""

import json
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart import page, run, task
from megatron_spo.config.load import load_config


def test_configs_load_with_every_variant() -> None:
    assert load_config(run.HERE / "sft.yaml").spo.schedule == "sft"
    assert load_config(run.HERE / "preference.yaml").spo.schedule == "penalty"
    for name, overrides in run.VARIANTS.items():
        config = load_config(run.HERE / "preference.yaml", overrides)
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
