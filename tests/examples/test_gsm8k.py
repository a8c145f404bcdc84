"""The GSM8K example: its runs, its data, its table, and all of it in miniature."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.common import StageFailed, read_jsonl
from examples.gsm8k import page, run, study
from megatron_spo.config.load import load_config
from megatron_spo.evaluate.final_answers import is_match
from tests.support.tiny import tiny_model, tiny_tokenizer, write_jsonl

RESULTS = run.HERE / "results"


def test_every_run_loads_and_the_most_informative_come_first() -> None:
    runs = study.all_runs()
    assert [one.name for one in runs[:5]] == ["sft_on_chosen", "dpo", "dpo+spo", "simpo", "simpo+spo"]
    assert len({one.key for one in runs}) == len(runs)
    assert {one.lr for one in runs if one.name == "dpo"} == set(study.LADDER)
    for one in runs:
        config = load_config(run.HERE / "preference.yaml", one.overrides())
        assert config.optimizer.lr == float(one.lr) and config.training.seed == one.seed
        loss, _, spo = one.name.partition("+")
        expected = {"": "none", "dual": "dual"}.get(spo, "penalty") if loss in study.LOSSES else "sft"
        assert config.spo.schedule == expected and (config.loss.name == loss or loss not in study.LOSSES)
        assert config.spo.lambda_ == (0.1 if spo in ("spo-0.1", "dual") else 1)


def test_problems_of_every_form_are_read_once(tmp_path: Path) -> None:
    rows = [
        {"question": "How many?", "answer": "2+3=<<2+3=5>>5\n#### 5"},
        {"prompt": "How much?", "completion": "It is 1,200.\n#### 1,200"},
        {"prompt": "How far?", "chosen": "1+1=2\nA: 2", "rejected": "A: 3"},
        {"prompt": "How far?", "chosen": "so A: 2", "rejected": "A: 4"},
        {"prompt": "How long?", "completion": "1+1=2\n2+1=3\n3+1=4\n4+1=5\n#### 5"},
    ]
    found = study.read_problems(write_jsonl(tmp_path / "problems.jsonl", rows))
    assert [one.question for one in found] == ["How many?", "How much?", "How far?"]
    assert all(is_match(f"#### {number}", one.right) for number, one in zip((5, 1200, 2), found, strict=True))
    assert found[0].solution == "2+3=5\n#### 5"
    with pytest.raises(StageFailed, match="bad.jsonl line 2: needs a text"):
        study.read_problems(write_jsonl(tmp_path / "bad.jsonl", [rows[0], {"question": "Why?"}]))
    with pytest.raises(StageFailed, match="nowhere does not exist"):
        study.read_problems(tmp_path / "nowhere")
    with pytest.raises(StageFailed, match="test: 4 problems are needed, but the file has 3"):
        study.draw(found, 4, 0, "test")


def test_answers_to_the_other_questions_are_right() -> None:
    for question, right in study.other_questions(60):
        inside = re.search(r"`(.*)`", question)
        text = inside[1] if inside else question.removeprefix("What is ").removesuffix("?")
        assert str(eval(text)) == right


def test_no_problem_is_in_both_sets_of_pairs() -> None:
    pairs = [{"prompt": f"p{i // 2}", "chosen": "a", "rejected": "b", "answer": "1", "scorer": "x"} for i in range(12)]
    scale = study.Scale(pairs=6, held_out_pairs=3, steps=2, batch=3)
    training, held_out = run.split(pairs, scale)
    assert len(training) == 6 and [row["prompt"] for row in held_out] == ["p4", "p5", "p5"]
    assert not {row["prompt"] for row in training} & {row["prompt"] for row in held_out}
    assert set(training[0]) == {"prompt", "chosen", "rejected", "answer"}
    assert len(run.split(pairs, replace(scale, pairs=10))[0]) == 8
    with pytest.raises(StageFailed, match="give 8 pairs besides 3 held-out ones, but a run needs 9"):
        run.split(pairs, replace(scale, steps=3))


def result(right: str, **more: object) -> dict:
    answers = {"right": right, "malformed": "0" * len(right), "words": [10] * len(right)}
    end = {"step": 8, "spo/chosen_shift": -5.0, "chosen_tokens": 100, "spo/rejected_shift": -6.0, "spo/both_down": 0.5,
           "rewards/accuracies": 0.75, "policy/entropy": 1.0, "pairs": 5}  # fmt: skip
    alarms = [{"step": 5, "data": "train", "alarm": "displacement"}]
    return {"answers": {"greedy": answers, "other": answers}, "held_out": [end], "alarms": alarms, **more}


def test_differences_are_paired_by_problem_and_averaged_over_seeds() -> None:
    base = {"answers": result("1100")["answers"], "rejected_tokens": 60}
    groups = {("sft_on_chosen", 2e-5): [result("1110")], ("dpo", 2e-5): [result("1000"), result("0000", alarms=[])],
              ("dpo+spo", 2e-5): [result("1100")]}  # fmt: skip
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.table(base, groups).splitlines()]
    header, (first, control, dpo, spo) = lines[0], [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    assert first["minus base"] == "" and first["first alarm"] == "" and "ranked right" in header
    assert control["minus base"].startswith("+0.250 [+0.000") and control["minus control"] == ""
    assert dpo["accuracy"].startswith("0.125") and dpo["minus base"].startswith("-0.375")
    assert dpo["minus control"].startswith("-0.625") and dpo["seeds"] == "2"
    assert dpo["chosen, nats per token"] == "-0.250" and dpo["rejected, nats per token"] == "-0.500"
    assert dpo["first alarm"] == "displacement at 5 (1 of 2 seeds)"
    assert dpo["minus loss alone"] == "" and spo["minus loss alone"].startswith("+0.375")
    np.testing.assert_allclose(page.per_problem(groups["dpo", 2e-5]), [0.5, 0, 0, 0])


def test_runs_are_compared_with_the_seeds_that_both_have() -> None:
    one, two = result("1100", seed=0), result("1111", seed=1)
    assert page.minus([one], [one | {}, two]).startswith("+0.000 [+0.000, +0.000")
    assert page.minus([one, two], [result("0000", seed=1)]).startswith("+1.000")
    assert page.minus([one, two], [result("0000")]).startswith("+0.750") and page.minus([one], None) == ""


def test_checkpoints_are_compared_on_the_same_problems() -> None:
    base = {"answers": result("1100")["answers"]}
    during = {"4": {"right": "11", "malformed": "00", "words": [20, 30]}}
    one = result("0111", name="dpo", lr=2e-5, during=during)
    rows = [(row["step"], row["right"], row["problems"], row["words"]) for row in page.trace(one, base)]
    assert rows == [("0", "2", "2", "10"), ("4", "2", "2", "25"), ("8", "1", "2", "10")]


def test_a_higher_limit_of_tokens_is_compared_on_the_same_problems() -> None:
    base = result("1100", rejected_tokens=60)
    one = result("1011", name="dpo", lr=1e-6, seed=1)
    one["answers"]["longer"] = {"right": "11", "malformed": "01", "words": [20, 30]}
    _, (limits,), (alarms,) = rows_of_tables(page.tables(base, {("dpo", 1e-6): [one]}) + "\n")
    assert list(limits.values()) == ["dpo, lr 1e-6, seed 1", "2", "1", "2", "0", "1"]
    assert list(alarms.values()) == ["dpo, lr 1e-6, seed 1", "-0.250", "5", "none", "none", "none", "0.750"]


@pytest.mark.parametrize("folder", [path.parent for path in RESULTS.glob("*/base.json")], ids=lambda path: path.name)
def test_the_shipped_table_follows_from_the_result_files(folder: Path) -> None:
    assert (folder / "table.md").read_text() == page.tables(*page.read(folder)) + "\n"
    pairs = run.digest(folder / "pairs.jsonl")
    base, groups = page.read(folder)
    for one in (one for ones in groups.values() for one in ones):
        assert one["pairs"] == pairs and len(one["answers"]["greedy"]["right"]) == len(
            base["answers"]["greedy"]["right"]
        )


def rows_of_tables(text: str) -> list[list[dict[str, str]]]:
    """Returns the rows of each Markdown table."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        found.append([dict(zip(header, line, strict=True)) for line in lines])
    return found


@pytest.mark.parametrize(
    ("page_of_docs", "count"), [("README.md", 1), ("examples/gsm8k/README.md", 4), ("docs/monitoring.md", 1)]
)
def test_tables_in_the_documentation_are_part_of_the_shipped_ones(page_of_docs: str, count: int) -> None:
    shipped = rows_of_tables((RESULTS / "qwen05/table.md").read_text())
    quoted = 0
    for table in rows_of_tables((run.HERE.parents[1] / page_of_docs).read_text()):
        sources = [rows for rows in shipped if set(table[0]) <= set(rows[0]) and "run" in table[0]]
        for row in table if sources else ():
            assert any(row.items() <= one.items() for rows in sources for one in rows), row
        quoted += bool(sources)
    assert quoted == count


def test_a_solution_is_text_or_messages_as_its_prompt_is() -> None:
    problem = study.Problem("How many?", "5", "2+3=5\n#### 5")
    text = study.solution_row(problem, chat=False, prompt=study.SHORT_PROMPT)
    assert text == {"prompt": "Problem: How many?\nSolution:", "completion": " 2+3=5\n#### 5"}
    chat = study.solution_row(problem, chat=True, prompt=study.SHORT_PROMPT)
    assert chat["prompt"] == [{"role": "user", "content": text["prompt"]}]
    assert chat["completion"] == [{"role": "assistant", "content": "2+3=5\n#### 5"}]


@pytest.mark.slow
def test_the_example_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model answers: with many end tokens (not digits) it often finishes, and is sometimes right by chance."""
    tiny_model(model := tmp_path / "model", num_hidden_layers=1, max_position_embeddings=1024)
    tiny_tokenizer(model, chat=True)
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": list(range(140, 256, 4))}))
    problems = [{"question": f"{i}?", "answer": str(i % 10)} for i in range(44)]
    files = [write_jsonl(tmp_path / f"{name}.jsonl", rows)
             for name, rows in (("train", problems[:34]), ("test", problems))]  # fmt: skip
    scale = replace(
        study.TINY, pair_problems=30, sampled_problems=30, samples=32, part=15, held_out_pairs=2, batch_size=512
    )
    monkeypatch.setattr(run, "TINY", scale)
    results, command = tmp_path / "results", [*map(str, files), "--model", str(model), "--tiny"]
    places = ["--results", str(results), "--out"]
    tried = [f"{name}-lr{study.COLLAPSES}" for name in (study.CONTROL, "dpo")]

    run.main([*command, *places, str(tmp_path / "one"), "--runs", "1"])
    assert not list(results.glob("sampled_*")) and len(read_jsonl(results / "pairs.jsonl")) == 8
    assert {path.stem for path in results.glob("*.json")} == {"study", "pairs_summary", "base", tried[0]}
    found = json.loads((results / f"{tried[0]}.json").read_text())
    assert len(found["answers"]["greedy"]["right"]) == 6 and len(found["answers"]["other"]["words"]) == 4
    assert len(found["answers"]["longer"]["words"]) == 4
    assert found["held_out"][-1]["step"] == 2 and found["held_out"][-1]["pairs"] == 2 and "sampled" in found["answers"]
    assert found["during"] == {}
    before = {path: path.stat().st_mtime_ns for path in results.iterdir() if path.suffix != ".md"}

    run.main([*command, *places, str(tmp_path / "two"), "--only", tried[1]])
    found = json.loads((results / f"{tried[1]}.json").read_text())
    assert list(found["during"]) == ["1"] and len(found["during"]["1"]["right"]) == 4
    assert "| dpo " in (results / "table.md").read_text() and "<svg" in (results / "runs.svg").read_text()
    kept = [path for path in before if path.suffix in (".json", ".jsonl")]
    assert all(path.stat().st_mtime_ns == before[path] for path in kept)
    assert not list((tmp_path / "two").glob("*-hf")) and not list((tmp_path / "two").glob("*/checkpoints"))

    with pytest.raises(StageFailed, match="results of another study: its study.json differs in prompts, seed"):
        run.main([*command, *places, str(tmp_path / "three"), "--seed", "1"])


@pytest.mark.slow
def test_a_base_model_is_trained_on_solutions_first(tmp_path: Path) -> None:
    """A random model without a chat template gives no pairs, but is trained, and samples with short prompts."""
    tiny_model(model := tmp_path / "model", num_hidden_layers=1)
    tiny_tokenizer(model)
    problems = [{"question": f"{i}?", "answer": f"{i}+0=<<{i}+0={i}>>{i}\n#### {i}"} for i in range(40)]
    files = [write_jsonl(tmp_path / f"{name}.jsonl", rows)
             for name, rows in (("train", problems[:30]), ("test", problems))]  # fmt: skip
    results, out = tmp_path / "results", tmp_path / "out"
    with pytest.raises(StageFailed, match="none of the 8 prompts gives a pair"):
        run.main([*map(str, files), "--model", str(model), "--tiny", "--sft-steps", "3", "--out", str(out),
                  "--results", str(results)])  # fmt: skip
    trained, asked = read_jsonl(out / "sft.jsonl"), read_jsonl(out / "train_problems.jsonl")
    assert len(trained) == 6 and not {row["prompt"] for row in trained} & {row["prompt"] for row in asked}
    assert trained[0]["prompt"].endswith("Solution:") and "<<" not in trained[0]["completion"]
    assert (out / "sft-hf/model.safetensors").is_file() and len(list(results.glob("sampled_*"))) == 2
