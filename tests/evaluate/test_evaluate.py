"""`megatron-spo evaluate` from the command line: answers, pairs and lm-evaluation-harness."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_spo import cli
from megatron_spo.evaluate.generate import generate_file
from tests.support.processes import read_metrics, run_jobs
from tests.support.tiny import arithmetic_pairs, tiny_judge, tiny_model, tiny_run, tiny_tokenizer, write_jsonl


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(count: int, right: int) -> list[dict]:
    """Returns rows with one answer each: the first `right` answers are right, and all but the last have ended."""
    return [
        {"prompt": f"{i}+1=", "chosen": f"so {i + 1}", "responses": [f"so {i + (1 if i < right else 2)}"],
         "finished": [i < count - 1]}
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random models in folders a and b, and pairs."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_model(folder / "a")
    tiny_model(folder / "b", seed=1)
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(9))
    return folder


def refused(arguments: Sequence[object], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", *map(str, arguments)]) == 2
    assert part in capsys.readouterr().err


def test_scores_of_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "answers.jsonl", answers(20, 15))
    assert cli.main(["evaluate", str(file), "--out", str(tmp_path / "deep" / "scores.json")]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "deep" / "scores.json").read_text())["files"][0]
    scores = found["scores"]
    assert scores["exact_match"]["value"] == 0.75 and scores["exact_match"]["rows"] == 20
    assert 0.5 < scores["exact_match"]["low"] < 0.75 < scores["exact_match"]["high"] < 1
    assert scores["malformed"]["value"] == 0.05 and scores["length_ratio"]["value"] == 1
    assert 0 < scores["distinct_2"] <= 1
    assert [row[0]["exact_match"] for row in found["rows"]] == [True] * 15 + [False] * 5
    assert "exact match" in shown and "0.750 [" in shown and "20 / 20" in shown


def test_two_files_are_compared_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write_jsonl(tmp_path / f"{right}.jsonl", answers(40, right)) for right in (20, 30)]
    assert cli.main(["evaluate", *map(str, files), "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    difference, alone = found["differences"]["exact_match"], found["files"][0]["scores"]["exact_match"]
    assert difference["value"] == 0.25 and difference["low"] > 0.1  # second minus first
    assert difference["high"] - difference["low"] < alone["high"] - alone["low"]
    assert found["differences"]["malformed"]["value"] == 0
    assert "+0.250 [+0." in capsys.readouterr().out
    write_jsonl(files[1], answers(39, 30))
    refused(files, "has 40 rows", capsys)
    write_jsonl(files[1], [{**row, "prompt": "other"} if i == 6 else row for i, row in enumerate(answers(40, 30))])
    refused(files, "30.jsonl line 7: the prompt differs from", capsys)


def test_what_generate_writes_is_evaluated(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"samples": 2, "temperature": 1.0, "max_new_tokens": 6}
    generate_file(models / "a", models / "pairs.jsonl", tmp_path / "answers.jsonl", **options)
    assert cli.main(["evaluate", str(tmp_path / "answers.jsonl")]) == 0
    assert "9 / 18" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"responses": "text"}, "line 2: field `responses` must be a list of one or more strings"),
        ({"responses": []}, "line 2: field `responses` must be a list of one or more strings"),
        ({"finished": [1]}, "line 2: field `finished` must be a list of 1 booleans"),
        ({"finished": None}, "line 2: field `finished` must be a list of 1 booleans"),
        ({"prompt": 3}, "line 2: field 'prompt' is a number; must be a string or a list of messages"),
    ],
)
def test_malformed_answers(changed: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = answers(3, 3)
    rows[1] |= changed
    refused([write_jsonl(tmp_path / "a.jsonl", rows)], message, capsys)


def test_alpaca_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[dict] = [{"role": "user", "content": "hi"}]
    message = {"prompt": asked, "responses": ["ho"], "finished": [True], "dataset": "x"}
    (tmp_path / "m").mkdir()
    file = write_jsonl(tmp_path / "m" / "a.jsonl", [*answers(1, 1), message])
    assert cli.main(["evaluate", str(file), "--alpaca-eval", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"instruction": "0+1=", "output": "so 1", "generator": "m/a"},
        {"dataset": "x", "instruction": "hi", "output": "ho", "generator": "m/a"},
    ]
    capsys.readouterr()
    for wrong, part in (
        ({**message, "responses": ["a", "b"], "finished": [True, True]}, "line 1: 2 responses, but AlpacaEval"),
        ({**message, "prompt": [{"role": "system", "content": "s"}, *asked]}, "line 1: AlpacaEval supports"),
    ):
        refused([write_jsonl(file, [wrong]), "--alpaca-eval", tmp_path / "o"], part, capsys)


def test_pairs_against_one_sequence_at_a_time(models: Path, tmp_path: Path) -> None:
    """Batches of any size give the same scores as a loop over single, unpadded sequences."""
    arguments = ["evaluate", "--model", str(models / "a"), "--pairs", str(models / "pairs.jsonl")]
    for size in ("1", "4"):
        assert cli.main([*arguments, "--batch-size", size, "--out", str(tmp_path / size)]) == 0
    found = [json.loads((tmp_path / size).read_text()) for size in ("1", "4")]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models / "a"), AutoTokenizer.from_pretrained(models / "a")
    for row, one, four in zip(rows_of(models / "pairs.jsonl"), *(f["rows"] for f in found), strict=True):
        for side in ("chosen", "rejected"):
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = torch.tensor([[*prompt, *tokenizer(row[side])["input_ids"], tokenizer.eos_token_id]])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].double().log_softmax(-1)
            expected = logps.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item()
            assert one[f"{side}_logp"] == pytest.approx(expected, rel=1e-5)
            assert four[f"{side}_logp"] == pytest.approx(expected, rel=1e-5)
            assert one[f"{side}_tokens"] == ids.shape[1] - len(prompt)
    means = np.array([[r[f"{s}_logp"] / r[f"{s}_tokens"] for s in ("chosen", "rejected")] for r in found[0]["rows"]])
    assert found[0]["scores"]["accuracy/mean"]["value"] == np.mean(means[:, 0] > means[:, 1])
    assert found[0]["rows"][3]["where"].endswith("pairs.jsonl line 4")


def test_the_reference_itself_is_a_tie(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "--model", models / "a", "--reference", models / "a", "--pairs", models / "pairs.jsonl"]
    assert cli.main(list(map(str, [*arguments, "--out", tmp_path / "out"]))) == 0
    scores = json.loads((tmp_path / "out").read_text())["scores"]
    assert scores["rewards/accuracies"]["value"] == 0.5 and scores["spo/both_down"]["value"] == 0
    assert "rewards/accuracies" in capsys.readouterr().out


def test_wrong_pairs_and_options(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: list[object] = ["--model", models / "a"]
    good: list[object] = ["--pairs", models / "pairs.jsonl"]
    bad = write_jsonl(tmp_path / "bad.jsonl", [*arithmetic_pairs(1), {"prompt": "a", "chosen": "b"}])
    refused([*model, "--pairs", bad], "bad.jsonl line 2: field 'rejected' is missing", capsys)
    refused([*model, *good, "--max-length", "6"], "data.max_length allows 6", capsys)
    refused([*model, "--pairs", tmp_path / "none.jsonl"], "none.jsonl does not exist", capsys)
    refused([*model, *good, "--max-length", "0"], "--max-length is 0", capsys)
    refused([*model, *good, "--batch-size", "0"], "--batch-size is 0", capsys)
    refused(["--model", tmp_path, *good], "is not a Hugging Face model folder", capsys)
    refused([], "give exactly one of ANSWERS.jsonl", capsys)
    refused(model, "give exactly one of ANSWERS.jsonl", capsys)
    refused(good, "--pairs requires --model", capsys)
    refused([bad, *model, *good], "give exactly one of ANSWERS.jsonl", capsys)
    refused([bad, "--truncation", "left"], "--truncation is not supported with ANSWERS", capsys)
    refused([bad, "--generator", "me"], "--generator requires --alpaca-eval", capsys)
    refused([bad, bad, bad], "got 3 answer files", capsys)
    assert cli.main(list(map(str, ["evaluate", *model, "--pairs", bad, "--bad-rows", "drop"]))) == 0
    assert "1 rows dropped" in capsys.readouterr().out


@pytest.mark.parametrize("chat", [False, True])
def test_pairs_equal_the_trainers_held_out_metrics(tmp_path: Path, chat: bool) -> None:
    """transformers computes a run's last held-out metrics from the exported model."""
    rows = arithmetic_pairs(30)
    if chat:
        for row in rows:
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            row |= {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    config = tiny_run(
        tmp_path,
        pairs=rows[:20],
        held_out=rows[20:],
        data={"max_length": 128},
        optimizer={"lr": 3e-3},
        training={"global_batch_size": 10, "eval_every": 4},
    )
    held_out = tmp_path / "held-out.jsonl"
    if chat:
        tiny_tokenizer(tmp_path / "model", chat=True)
    losses = ("dpo",) if chat else ("dpo", "simpo")
    trains = [("train", str(config), [f"output={tmp_path}/{loss}", f"loss.name={loss}"]) for loss in losses]
    run_jobs([("reference", str(config), []), *trains], 1)
    for loss in losses:
        exported = tmp_path / f"{loss}-hf"
        assert cli.main(["convert", str(tmp_path / loss), str(exported), "--to", "hf"]) == 0
        arguments = ["--model", exported, "--reference", tmp_path / "model", "--pairs", held_out]
        assert cli.main(["evaluate", *map(str, arguments), "--out", str(tmp_path / "out")]) == 0
        scores = {name: one["value"] for name, one in json.loads((tmp_path / "out").read_text())["scores"].items()}
        (trained,) = [
            line for (kind, _, step), line in read_metrics(tmp_path / loss).items() if (kind, step) == ("eval", 4)
        ]
        if loss == "simpo":  # its rewards are mean log-probs, without the reference
            assert trained["rewards/accuracies"] == pytest.approx(scores.pop("accuracy/mean"), abs=1e-9)
            del scores["rewards/accuracies"]
        common = scores.keys() & trained.keys()
        assert len(common) == (6 if loss == "dpo" else 5)
        assert not math.isclose(trained["spo/chosen_shift"], 0, abs_tol=1e-2)
        for name in common:
            assert scores[name] == pytest.approx(trained[name], rel=1e-4, abs=1e-4), name


def test_harness_on_a_local_task(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The harness's accuracy on our pairs as a multiple-choice task equals our own ranking."""
    pytest.importorskip("lm_eval")
    rows = [{**row, "answers": [row["chosen"], row["rejected"]]} for row in arithmetic_pairs(9)]
    data = write_jsonl(tmp_path / "choices.jsonl", rows)
    task = tmp_path / "pairs_task.yaml"
    task.write_text(
        f"""
task: pairs_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    out = tmp_path / "out.json"
    arguments = ["evaluate", "--model", str(models / "a"), "--tasks", str(task), "--out", str(out)]
    assert cli.main(arguments) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models / "a"), AutoTokenizer.from_pretrained(models / "a")

    def log_probability(prompt: str, answer: str) -> float:
        ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        return float(logps[len(tokenizer(prompt)["input_ids"]) - 1 :].sum())

    right = [log_probability(r["prompt"], r["chosen"]) > log_probability(r["prompt"], r["rejected"]) for r in rows]
    found = json.loads(out.read_text())["results"]["pairs_task"]
    assert found["acc,none"] == pytest.approx(np.mean(right))
    assert "pairs_task" in capsys.readouterr().out
    refused(["--model", models / "a", "--tasks", "no_such_task"], "has no task 'no_such_task'", capsys)
    refused(["--model", models / "a", "--tasks", tmp_path / "no.yaml"], "no.yaml does not exist", capsys)


def chat_answers(texts: Sequence[str]) -> list[dict]:
    """Returns rows of conversations without expected answers; the reference text is the first row's answer."""
    chosen = [{"role": "assistant", "content": "yes it is"}]
    return [{"prompt": [{"role": "user", "content": f"say {i}"}], "chosen": chosen, "responses": [text],
             "finished": [True]} for i, text in enumerate(texts)]  # fmt: skip


def test_win_rate_by_a_tiny_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The scores are those of the model on each conversation alone, without padding."""
    before = write_jsonl(tmp_path / "before.jsonl", chat_answers(["no", "maybe so", "a much longer answer", "x"]))
    after = write_jsonl(tmp_path / "after.jsonl", chat_answers(["yes it is", "maybe not", " yes it is\n", "x"]))
    folder = tiny_judge(tmp_path / "judge")
    arguments = [before, after, "--reward-model", folder, "--batch-size", 3, "--out", tmp_path / "out.json"]
    assert cli.main(["evaluate", *map(str, arguments)]) == 0
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    rewards = []
    for row in [*rows_of(before), *rows_of(after)]:
        conversation = [*row["prompt"], {"role": "assistant", "content": row["responses"][0]}]
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            rewards.append(float(model(input_ids=ids).logits[0, 0]))
    assert [row[0] for file in found["files"] for row in file["rewards"]] == pytest.approx(rewards, abs=1e-5)
    wins = [1.0 if new > old else 0.5 if new == old else 0.0 for old, new in zip(rewards[:4], rewards[4:], strict=True)]
    assert found["win_rate"]["value"] == np.mean(wins) and wins[3] == 0.5
    assert found["win_rate"]["low"] <= np.mean(wins) <= found["win_rate"]["high"]
    assert [one["scores"]["text_match"]["value"] for one in found["files"]] == [0.0, 0.5]
    assert "win rate" in shown and "reward or judge's score" in shown and "same text as reference" in shown
    assert "exact match: 0 of 4 rows of before.jsonl have an expected answer" in shown


def test_win_rate_by_the_scores_of_a_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write_jsonl(tmp_path / f"{name}.jsonl", answers(4, 2)) for name in ("a", "b")]
    scores = [
        write_jsonl(tmp_path / f"{i}.jsonl", [{"scores": [score]} for score in found])
        for i, found in enumerate(([1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 1.5, 9.0]))
    ]
    arguments = [*files, "--scores", *scores, "--out", tmp_path / "out.json"]
    assert cli.main(["evaluate", *map(str, arguments)]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["win_rate"]["value"] == 0.625 and found["differences"]["reward"]["value"] == pytest.approx(1.125)
    assert "0.625 [" in capsys.readouterr().out
    assert cli.main(["evaluate", str(files[0]), "--scores", str(scores[0])]) == 0
    assert "2.500 [" in capsys.readouterr().out
    short = write_jsonl(tmp_path / "short.jsonl", [{"scores": [1]}])
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"scores": [1]}, {"scores": ["good"]}] * 2)
    elsewhere = write_jsonl(tmp_path / "other.jsonl", [{"scores": [1], "prompt": "7+1="}] * 4)
    refused([*files, "--scores", scores[0]], "got 1 files for --scores; give one for each of the 2 files", capsys)
    refused([files[0], "--scores", short], "short.jsonl has 1 rows, but", capsys)
    refused([files[0], "--scores", odd], "odd.jsonl line 2: field `scores` must be a list of 1 numbers", capsys)
    refused([files[0], "--scores", elsewhere], "other.jsonl line 1: the prompt differs", capsys)
    refused([files[0], "--scores", odd, "--reward-model", tmp_path], "either --scores or --reward-model", capsys)
    refused([files[0], "--batch-size", 2], "--batch-size is not supported with ANSWERS", capsys)


def test_what_is_no_reward_model_is_refused(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "answers.jsonl", chat_answers(["yes"]))
    long = write_jsonl(tmp_path / "long.jsonl", chat_answers(["yes " * 40]))
    two = tiny_judge(tmp_path / "two", num_labels=2)
    refused([file, "--reward-model", models / "a"], "has 2 outputs, but a reward model has one", capsys)
    refused([file, "--reward-model", two], "has 2 outputs", capsys)
    config = json.loads((models / "a/config.json").read_text())
    tiny_model(copy := tmp_path / "causal")
    (copy / "config.json").write_text(json.dumps({**config, "id2label": {"0": "score"}, "label2id": {"score": 0}}))
    refused([file, "--reward-model", copy], "is not a sequence classifier: its weights lack score.weight", capsys)
    refused([long, "--reward-model", tiny_judge(tmp_path / "judge")], "the context of the model is 64", capsys)
