"""`megatron-spo pairs`: which pairs are made, against values computed by hand, and what is rejected."""

import json
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

from megatron_spo.cli import main
from megatron_spo.config.data_source import DataSource
from megatron_spo.data.pairs import open_source, parse_row
from megatron_spo.on_policy.choice import choose, length_ratio, similarity
from megatron_spo.on_policy.rules import PairRules
from tests.support.tiny import tiny_model, tiny_tokenizer, write_jsonl

Row = dict[str, Any]


def answered(prompt: Any, responses: Sequence[str], *, unfinished: Sequence[int] = (), **more: Any) -> Row:
    finished = [i not in unfinished for i in range(len(responses))]
    return {"prompt": prompt, "responses": list(responses), "finished": finished, **more}


def run(folder: Path, rows: Sequence[Row], scorer: str, *options: object, code: int = 0) -> list[Row]:
    """Runs `pairs` on rows; returns its rows without those keys that are equal in all of them."""
    write_jsonl(folder / "answers.jsonl", list(rows))
    out = folder / "pairs.jsonl"
    out.unlink(missing_ok=True)
    arguments = ["pairs", folder / "answers.jsonl", "--out", out, "--scorer", scorer, *options]
    assert main([*map(str, arguments), "--summary", str(folder / "summary.json")]) == code
    return [json.loads(line) for line in out.read_text().splitlines()] if code == 0 else []


def summary(folder: Path) -> Row:
    found: Row = json.loads((folder / "summary.json").read_text())
    return found


def samples(pairs: Sequence[Row]) -> list[tuple[int, int]]:
    return [(pair["sample_chosen"], pair["sample_rejected"]) for pair in pairs]


def test_pairs_by_exact_match(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        answered("1+1=", ["so 3", "so 2", "it is 2.0", "2"], answer="2", id=7),  # sample 1 is the first right one
        answered("2+2=", ["4", "so 4"], answer="4"),
        answered("3+3=", ["7", "8", "9"], answer="6"),
        answered("4+4=", ["8", "9", "", "9 "], answer="8", unfinished=[0]),  # the right one has reached the limit
        answered("5+5=", ["10", " 10", "11"], answer="10"),
    ]
    pairs = run(tmp_path, rows, "exact_match")
    assert pairs == [
        {
            "prompt": "1+1=", "answer": "2", "id": 7, "chosen": "so 2", "rejected": "so 3", "score_chosen": 1.0,
            "score_rejected": 0.0, "sample_chosen": 1, "sample_rejected": 0, "scorer": "exact_match",
            "sampled_from": f"{tmp_path}/answers.jsonl line 1",
        },
        {
            "prompt": "5+5=", "answer": "10", "chosen": "10", "rejected": "11", "score_chosen": 1.0,
            "score_rejected": 0.0, "sample_chosen": 0, "sample_rejected": 2, "scorer": "exact_match",
            "sampled_from": f"{tmp_path}/answers.jsonl line 5",
        },
    ]  # fmt: skip
    found = summary(tmp_path)
    assert found["prompts"] == 5 and found["answers"] == 16 and found["pairs"] == found["prompts_with_pairs"] == 2
    assert {reason: count for reason, count in found["without_pairs"].items() if count} == {
        "all right": 1,
        "all wrong": 2,
    }
    assert found["not_used"] == {"unfinished": 1, "empty": 1, "duplicate": 2}
    assert found["means"]["score"] == pytest.approx(8 / 16)  # 3 + 2 + 0 + 1 + 2
    assert found["means"]["finished"] == pytest.approx(15 / 16)
    assert found["means"]["characters_chosen"] == 3.0 and found["means"]["characters_rejected"] == 3.0
    shown = capsys.readouterr().out
    assert "40.0% of 5" in shown and "without: all wrong" in shown


def test_the_pairs_can_be_trained_on(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "1+1="}]
    run(tmp_path, [answered("1+1=", ["2", "3"], answer="2"), answered(chat, ["3", "2"], answer="2")], "exact_match")
    source = open_source(DataSource(path=str(tmp_path / "pairs.jsonl")))
    assert len(source.rows) == 2
    text, messages = (
        parse_row(json.loads(line), kind="preference") for line in (tmp_path / "pairs.jsonl").read_text().splitlines()
    )
    assert (text.prompt, text.chosen, text.rejected) == ("1+1=", "2", "3")
    assert messages.prompt == chat
    assert messages.chosen == [{"role": "assistant", "content": "2"}]
    assert messages.rejected == [{"role": "assistant", "content": "3"}]


def test_several_files_of_answers(tmp_path: Path) -> None:
    rows = [answered(f"{i}+1=", [str(i), str(i + 1)], answer=i + 1) for i in (1, 2)]
    files = [write_jsonl(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate(rows)]
    assert main(["pairs", *map(str, files), "--scorer", "exact_match", "--out", str(tmp_path / "out.jsonl")]) == 0
    pairs = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["sampled_from"] for row in pairs] == [f"{file} line 1" for file in files]


GRADED = [0.1, 0.9, 0.4, 0.9, 0.2]
WORDS = ["a b c d e", "a b c d f", "much longer than all of the others are", "a b c d e f", "x"]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, [(1, 0)]),  # the largest difference, .8; of samples 1 and 3 the first
        ({"per_prompt": 2}, [(1, 0), (3, 4)]),  # .8 and .7, each answer once
        ({"per_prompt": 9}, [(1, 0), (3, 4)]),  # sample 2 would be left without a partner
        ({"margin": 0.8}, [(1, 0)]),
        ({"margin": 0.81}, "margin"),
        ({"max_length_ratio": 1.0}, [(1, 0)]),  # 9 characters each
        ({"max_length_ratio": 1.3, "per_prompt": 9}, [(1, 0)]),  # 3 against 0 has 11 and 9, but 0 is used
        ({"max_similarity": 0.5, "per_prompt": 9}, [(1, 0), (3, 4)]),
        # 1 and 0 share abc bcd of abc bcd cde cdf: .5; 3 has abc bcd cde def, it shares .75 with 0, and .4 with 1
        ({"max_similarity": 0.4, "per_prompt": 9}, [(1, 4), (3, 2)]),
        ({"max_similarity": 0.39, "per_prompt": 9}, [(1, 4), (2, 0)]),  # 3 is a duplicate of 1
        ({"choose": "right-wrong", "right": 0.95}, "all wrong"),
        ({"choose": "right-wrong", "right": 0.1}, "all right"),
    ],
)
def test_the_choice(rules: Mapping[str, Any], expected: list[tuple[int, int]] | str) -> None:
    choice = choose(WORDS, [True] * 5, GRADED, PairRules(scorer="column=s", **rules), random.Random(0))
    assert (choice.pairs or choice.reason) == expected


def test_similarity_and_length_ratio() -> None:
    assert similarity(WORDS[0], WORDS[1]) == 2 / 4
    assert similarity(WORDS[0], WORDS[3]) == 3 / 4
    assert similarity(WORDS[1], WORDS[3]) == 2 / 5
    assert similarity("x", "x") == 1 and similarity("x", "y") == 0
    assert length_ratio("abcd", " ab ") == 2


def test_ties_duplicates_and_limits(tmp_path: Path) -> None:
    rows = [
        answered("a", ["x", "y"], s=[0.5, 0.5]),
        answered("b", ["x"], s=[1]),
        answered("c", ["same", "same ", "other"], s=[1.0, 0.0, 0.4]),  # the mean of the identical ones is .5
        answered("d", ["x", "y z"], s=[3, 1], unfinished=[1]),
    ]
    pairs = run(tmp_path, rows, "column=s")
    assert [(pair["prompt"], pair["chosen"], pair["score_chosen"]) for pair in pairs] == [("c", "same", 0.5)]
    reasons = {reason: count for reason, count in summary(tmp_path)["without_pairs"].items() if count}
    assert reasons == {"equal scores": 1, "too few answers": 2}
    pairs = run(tmp_path, rows, "column=s", "--unfinished", "reject")
    assert [(pair["prompt"], pair["rejected"]) for pair in pairs] == [("c", "other"), ("d", "y z")]
    rows = [answered("e", ["x", "y"], s=[3, 1], unfinished=[0]), answered("f", ["x", "x"], s=[3, 1], unfinished=[1])]
    run(tmp_path, rows, "column=s", "--unfinished", "reject", code=2)
    reasons = {reason: count for reason, count in summary(tmp_path)["without_pairs"].items() if count}
    assert reasons == {"too few answers": 1, "similarity": 1}  # a cut off best answer; equal texts


def test_random_pairs_are_uniform_and_depend_only_on_the_seed_and_the_row(tmp_path: Path) -> None:
    row = answered("1+1=", ["2", "so 2", "3", "so 3", "4"], answer="2")
    options = ("--choose", "right-wrong", "--per-prompt", 2)
    pairs = run(tmp_path, [row] * 600, "exact_match", *options)
    drawn = Counter(samples(pairs))
    assert set(drawn) == {(i, j) for i in (0, 1) for j in (2, 3, 4)} and len(pairs) == 1200
    assert all(abs(count - 200) < 60 for count in drawn.values())  # 4.6 standard deviations
    assert len({tuple(samples(pairs[i : i + 2])) for i in range(0, 1200, 2)}) > 20  # never the same pair twice
    assert all(one["sample_chosen"] is not None for one in pairs)
    again = run(tmp_path, [row] * 60, "exact_match", *options)
    assert samples(again) == samples(pairs)[:120]
    assert samples(run(tmp_path, [row] * 60, "exact_match", *options, "--seed", 1)) != samples(again)
    assert len(run(tmp_path, [row], "exact_match", "--choose", "right-wrong", "--per-prompt", 99)) == 6


FUNCTION = """
import sys, time, os
import numpy as np

def length(prompts, completions, bonus, **others):
    assert prompts == ["p"] * len(completions) and set(others) == {"responses_of"}, others
    return [len(text) + more for text, more in zip(completions, bonus)]

def of_messages(prompts, completions, **others):
    assert all(completion[0]["role"] == "assistant" for completion in completions)
    return np.array([len(completion[0]["content"]) for completion in completions], dtype=np.float32)

def fails(prompts, completions, **others):
    raise KeyError("no such thing")

def exits(prompts, completions, **others):
    sys.exit(3)

def dies(prompts, completions, **others):
    os._exit(7)

def hangs(prompts, completions, **others):
    while True:
        pass

def nan(prompts, completions, **others):
    return [0.0, float("nan")]

def short(prompts, completions, **others):
    return [0.0]

def none(prompts, completions, **others):
    pass

def words(prompts, completions, **others):
    return ["good", "bad"]

def huge(prompts, completions, **others):
    return [0, 10 ** 400]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_scorers.py").write_text(FUNCTION)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_function_of_the_user(here: Path) -> None:
    row = answered("p", ["longest", "x", "yy"], bonus=0.5, responses_of="m", completion="old")
    (pair,) = run(here, [row], "function=my_scorers:length")
    assert (pair["chosen"], pair["score_chosen"]) == ("longest", 7.5)
    assert (pair["rejected"], pair["score_rejected"]) == ("x", 1.5)
    chat = answered([{"role": "user", "content": "q"}], ["a", "bc"])
    (pair,) = run(here, [chat], "function=my_scorers:of_messages")
    assert pair["chosen"] == [{"role": "assistant", "content": "bc"}] and pair["score_chosen"] == 2.0
    assert "my_scorers" not in sys.modules  # it ran in a process of its own


TWO = answered("p", ["x", "y"], answer="1")
REJECTED: dict[str, tuple[Row, list[str], str]] = {
    "raises": (TWO, ["function=my_scorers:fails"], "line 1: the function my_scorers:fails failed: KeyError: 'no such"),
    "exits": (TWO, ["function=my_scorers:exits"], "line 1: the function my_scorers:exits failed: SystemExit: 3"),
    "dies": (TWO, ["function=my_scorers:dies"], "line 1: the function my_scorers:dies failed: its process ended with "
             "exit code 7"),
    "hangs": (TWO, ["function=my_scorers:hangs", "--timeout", "0.5"], "my_scorers:hangs did not return within 0.5 "
              "seconds; correct it, or raise --timeout"),
    "nan": (TWO, ["function=my_scorers:nan"], "line 1: function=my_scorers:nan gives nan as the score of response 1; "
            "must be a finite number"),
    "too few": (TWO, ["function=my_scorers:short"], "gives 1 scores for 2 responses"),
    "nothing": (TWO, ["function=my_scorers:none"], "gives null; must be a list of 2 numbers"),
    "words": (TWO, ["function=my_scorers:words"], "gives a string as the score of response 0; must be a number"),
    "huge": (TWO, ["function=my_scorers:huge"], "as the score of response 1; must be a finite number"),
    "no module": (TWO, ["function=nowhere:f"], "the function nowhere:f cannot be imported: ModuleNotFoundError"),
    "broken module": (TWO, ["function=broken:f"], "broken:f cannot be imported: ModuleNotFoundError: No module named "
                      "'nothing_of_that_name'"),
    "no function": (TWO, ["function=my_scorers:absent"], "cannot be imported: AttributeError"),
    "no colon": (TWO, ["function=my_scorers"], "a function is given as function=MODULE:NAME"),
    "unknown": (TWO, ["judge"], "pairs: --scorer is 'judge'; must be exact_match, model=FOLDER, column=KEY"),
    "no answer": (answered("p", ["x"]), ["exact_match"], "line 1: field 'answer' is missing"),
    "no column": (TWO, ["column=score"], "line 1: field 'score' is missing"),
    "nan in the column": ({**TWO, "s": [float("nan"), 1]}, ["column=s"], "line 1: column=s gives nan as the score of "
                          "response 0"),
    "null in the column": ({**TWO, "s": [None, 1]}, ["column=s"], "gives null as the score of response 0"),
    "one number": ({**TWO, "s": 3}, ["column=s"], "line 1: column=s gives a number; must be a list of 2 numbers"),
    "no responses": ({"prompt": "p"}, ["exact_match"], "line 1: field `responses` must be a list"),
    "no pair": (answered("p", ["1", "1"], answer="1"), ["exact_match"], "of the 1 prompts gives a pair (all right 1)"),
    "margin": (TWO, ["exact_match", "--margin", "-1"], "pairs: --margin is -1.0: must be greater than or equal to 0"),
    "similarity": (TWO, ["exact_match", "--max-similarity", "0"], "pairs: --max-similarity is 0.0: must be greater"),
    "right": (TWO, ["column=s", "--right", "2"], "--right has no effect"),
    "no model": (TWO, ["model=nowhere"], "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_what_is_rejected(here: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    row, (scorer, *options), said = REJECTED[case]
    run(here, [row], scorer, *options, code=2)
    error = capsys.readouterr().err
    assert said in error and error.count("error: ") == 1, error
    assert not (here / "pairs.jsonl").exists()


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    config = tiny_model(folder, num_hidden_layers=2).config
    config.num_labels = 1
    torch.manual_seed(1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer(folder, chat=True)
    return folder


def test_a_reward_model(reward_model: Path, tmp_path: Path) -> None:
    """Batched scores equal those of one sequence at a time, without padding."""
    texts = ["yes", "a much longer answer than that", "no", "4"]
    chat = [{"role": "user", "content": "2+2="}]
    rows = [answered("2+2=", texts), answered(chat, texts)]
    model = LlamaForSequenceClassification.from_pretrained(reward_model)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    by_hand = {}
    for start, end in (("2+2=", "<|end|>"), ("<|user|>2+2=<|end|><|assistant|>", "")):
        for text in texts:
            written = f"{start}{text}{end}" if end else f"<|user|>2+2=<|end|><|assistant|>{text}<|end|>"
            by_hand[start, text] = model(torch.tensor([tokenizer(written)["input_ids"]])).logits[0, 0].item()
    pairs = run(tmp_path, rows, f"model={reward_model}", "--batch-size", 3)
    for pair, start in zip(pairs, ("2+2=", "<|user|>2+2=<|end|><|assistant|>"), strict=True):
        rewards = {text: by_hand[start, text] for text in texts}
        best, worst = max(rewards, key=rewards.__getitem__), min(rewards, key=rewards.__getitem__)
        chosen, rejected = (pair[side] if isinstance(pair[side], str) else pair[side][0]["content"]
                            for side in ("chosen", "rejected"))  # fmt: skip
        assert (chosen, rejected) == (best, worst)
        assert pair["score_chosen"] == pytest.approx(rewards[best], abs=1e-5)
        assert pair["score_rejected"] == pytest.approx(rewards[worst], abs=1e-5)


def test_models_that_are_no_reward_models(
    reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(tmp_path / "causal", num_hidden_layers=1, num_labels=1)
    tiny_model(tmp_path / "two", num_hidden_layers=1, num_labels=2)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "causal").lm_head is not None
    run(tmp_path, [TWO], f"model={tmp_path / 'causal'}", code=2)
    assert "causal is not a sequence classifier: score.weight is missing" in capsys.readouterr().err
    run(tmp_path, [TWO], f"model={tmp_path / 'two'}", code=2)
    assert "the classifier has 2 outputs, but a reward model has one" in capsys.readouterr().err
    run(tmp_path, [answered("p", ["x" * 600, "y"])], f"model={reward_model}", code=2)
    assert "answers.jsonl line 1: prompt and response have 602 tokens" in capsys.readouterr().err
    chat = [{"role": "user", "content": "q"}]
    run(tmp_path, [answered(chat, ["x", "y"])], f"model={tmp_path / 'causal'}", code=2)
    assert "line 1: the prompt is a list of messages, but the reward model has no" in capsys.readouterr().err
