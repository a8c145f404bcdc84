"""The diagnostics of pairs against transformers' hidden states, and what data.drop_ches leaves out."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_spo.cli import main
from tests.data.test_edit_distance import plain
from tests.support.tiny import arithmetic_pairs, tiny_run, write_jsonl

COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ches")
    tiny_run(folder, family="qwen3", shape={"tie_word_embeddings": True}, pairs=COUNT, training={"steps": 1})
    write_jsonl(folder / "sft.jsonl", [{"prompt": "1+1=", "completion": "2"}] * 3)
    return folder


@pytest.fixture(scope="module")
def table(folder: Path) -> dict[str, list]:
    assert main(["reference", str(folder / "config.yaml")]) == 0
    (path,) = (folder / "cache").glob("train-*/pairs.parquet")
    return pq.read_table(path).to_pydict()


def test_against_transformers(folder: Path, table: dict[str, list]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert table["row"] == list(range(1, COUNT + 1))
    for i, row in enumerate(arithmetic_pairs(COUNT)):
        prompt = tokenizer(row["prompt"]).input_ids
        states, logprobs, answers = [], [], []
        for side in ("chosen", "rejected"):
            answer = [*tokenizer(row[side]).input_ids, tokenizer.eos_token_id]
            ids = torch.tensor([[*prompt, *answer]])
            with torch.no_grad():
                out = model(ids, output_hidden_states=True)
            states.append(out.hidden_states[-1][0, len(prompt) - 1 : -1].double())  # what predicts the answer's tokens
            picked = out.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            logprobs.append(float(picked.sum()))
            answers.append(answer)
        for name, (c, r) in {"ches": [s.sum(0) for s in states], "ches_per_token": [s.mean(0) for s in states]}.items():
            assert table[name][i] == pytest.approx(float(c @ r - c @ c), rel=1e-4, abs=1e-3)
        assert table["reference_margin"][i] == pytest.approx(logprobs[0] - logprobs[1], rel=1e-4, abs=1e-4)
        assert table["length_difference"][i] == len(answers[0]) - len(answers[1])
        assert table["edit_distance"][i] == pytest.approx(plain(*answers) / max(map(len, answers)))


def test_the_worst_are_shown_and_dropped(
    folder: Path, table: dict[str, list], capsys: pytest.CaptureFixture[str]
) -> None:
    worst = sorted(range(COUNT), key=lambda i: -table["ches_per_token"][i])
    assert main(["reference", str(folder / "config.yaml")]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if "CHES per token" in line]
    assert [int(line.split(" line ")[1].split(":")[0]) for line in shown] == [i + 1 for i in worst[:10]]
    given = ["training.steps=null", "training.epochs=1", "data.drop_ches=0.25"]
    assert main(["train", str(folder / "config.yaml"), *given]) == 0
    dropped = [json.loads(line) for line in (folder / "run/dropped_rows.jsonl").read_text().splitlines()]
    assert sorted(row["line"] for row in dropped) == sorted(i + 1 for i in worst[:6])
    assert all("data.drop_ches" in row["reason"] for row in dropped)
    assert "6 rows dropped" in capsys.readouterr().err
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert sum(line["pairs"] for line in lines) == 18
    assert lines[0]["spo/chosen_shift"] == pytest.approx(0, abs=1e-5)  # the cache's rows moved along
    assert main(["train", str(folder / "config.yaml"), *given[:2]]) == 2
    assert "data.drop_ches" in capsys.readouterr().err


def test_sft_rows_have_no_scores(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"data.train={folder}/sft.jsonl", "spo.schedule=sft"]
    assert main(["reference", str(folder / "config.yaml"), *given]) == 0
    assert main(["train", str(folder / "config.yaml"), *given, "data.drop_ches=0.1"]) == 2
    assert "a spo.schedule other than sft" in capsys.readouterr().err
