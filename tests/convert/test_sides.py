"""Side files: a round trip keeps all of them, and an export uses the end tokens and template of the training."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, GenerationConfig

from megatron_spo.cli import main
from megatron_spo.config.data_source import DataSource
from megatron_spo.config.schema import DataConfig
from megatron_spo.convert.card import base_name, hub_id_of, licence_of
from megatron_spo.convert.export import DONE, convert
from megatron_spo.convert.sides import SideFiles, write_chat_template
from megatron_spo.data.dataset import build_dataset
from megatron_spo.data.end_of_turn import end_tokens
from tests.support.tiny import CHAT_TEMPLATE, arithmetic_pairs, tiny_model, tiny_tokenizer, write_jsonl

EOS, END = 1, 5  # ids of <eos> and <|end|>
LICENCE = "---\nlicense: apache-2.0\ntags: [x]\n---\n# The base\n"


def chat(rows: list[dict]) -> list[dict]:
    sides = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{key: [{"role": role, "content": row[key]}] for key, role in sides.items()} for row in rows]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with files of every kind next to its weights."""
    folder = tmp_path / "model"
    tiny_model(folder, num_hidden_layers=1)
    (folder / "additional_chat_templates").mkdir()
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.json", "LICENSE", "README.md",
                 "additional_chat_templates/tool_use.jinja", "vocab.txt", "configuration_own.py"):  # fmt: skip
        (folder / name).write_text(f"content of {name}")
    return folder


def side_files(folder: Path) -> dict[str, bytes]:
    own = ("model.safetensors", DONE)
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(own)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("to", ["megatron", "nemo"])
def test_a_round_trip_keeps_every_file(tmp_path: Path, model: Path, to: str) -> None:
    expected = side_files(model)
    assert convert(model, tmp_path / to, to, verify=True)[1:-1] == (
        ["padded the vocabulary from 262 to 384 rows; --to hf removes the padding"] if to == "megatron" else []
    )
    notes = convert(tmp_path / to, tmp_path / "hf", "hf", verify=True)
    assert not any("not copied" in note for note in notes)
    found = side_files(tmp_path / "hf")
    assert found.keys() == expected.keys()
    changed = {name for name, content in expected.items() if found[name] != content}
    # NeMo has its own configuration, and requires transformers 4
    assert changed <= ({"config.json", "tokenizer_config.json"} if to == "nemo" else set())


def test_a_changed_chat_template_of_a_megatron_folder_is_found(tmp_path: Path, model: Path) -> None:
    convert(model, tmp_path / "megatron", "megatron")
    (tmp_path / "megatron/additional_chat_templates/tool_use.jinja").write_text("another")
    assert main(["convert", str(tmp_path / "megatron"), str(tmp_path / "hf"), "--to", "hf"]) == 2


def test_other_weights_and_folders_are_left_out_and_named(tmp_path: Path, model: Path) -> None:
    (model / "consolidated.safetensors").write_bytes(b"")
    (model / "original").mkdir()
    (model / ".cache").mkdir()
    notes = convert(model, tmp_path / "megatron", "megatron")
    assert f"{model}: not copied: consolidated.safetensors, original" in notes
    assert not (tmp_path / "megatron/original").exists()


def test_named_templates_stay_beside_the_trained_one(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = {"default": "old", "tool_use": "with tools"}
    tokenizer.save_pretrained(tmp_path, save_jinja_files=False)  # as transformers 4 did
    write_chat_template(tmp_path, "{# new #}\n")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == {"default": "{# new #}\n", "tool_use": "with tools"}
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_the_tokenizer_of_another_folder_takes_the_place_of_all_of_it(tmp_path: Path, model: Path) -> None:
    (model / "chat_template.jinja").write_text("of the model")
    tiny_tokenizer(tmp_path / "other")
    write_jsonl(tmp_path / "other/generation_config.json", [{"eos_token_id": 4}])
    (tmp_path / "out").mkdir()
    SideFiles((model,), tokenizer=tmp_path / "other").write(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None
    found = side_files(tmp_path / "out")
    assert found["generation_config.json"] == (model / "generation_config.json").read_bytes()
    assert "preprocessor_config.json" in found and "vocab.txt" not in found


@pytest.mark.parametrize(
    ("generation", "ends", "expected"),
    [
        ({"eos_token_id": EOS, "top_k": 3}, (END,), [EOS, END]),
        ({"eos_token_id": [2, EOS]}, (EOS, END), [2, EOS, END]),
        ({"eos_token_id": [EOS, END]}, (END,), [EOS, END]),
        ({"top_k": 3}, (END,), END),
        (None, (END,), [EOS, END]),  # <eos> comes from config.json
    ],
)
def test_the_trained_end_is_an_end_token(
    tmp_path: Path, model: Path, generation: dict | None, ends: tuple[int, ...], expected: int | list[int]
) -> None:
    (model / "generation_config.json").unlink()
    if generation is not None:
        (model / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "out").mkdir()
    notes = SideFiles((model,), ends=ends).write(tmp_path / "out")
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert found.eos_token_id == expected
    assert found.top_k == (generation or {}).get("top_k")
    added = f"added {END} to eos_token_id" in " ".join(notes)
    assert added == (generation is None or END not in np.atleast_1d(generation.get("eos_token_id", EOS)))


def test_what_answers_end_with(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    plain = write_jsonl(tmp_path / "plain.jsonl", arithmetic_pairs(4))
    turns = write_jsonl(tmp_path / "turns.jsonl", chat(arithmetic_pairs(4)))

    def ends(path: Path, **limits: Any) -> list[int]:
        data = DataConfig(train=[DataSource(path=str(path))], **limits)
        return end_tokens([build_dataset(data.train, data, tokenizer, cache=tmp_path / "cache")], data, tokenizer)

    assert ends(plain, max_length=64) == [EOS]
    tokenizer.chat_template = CHAT_TEMPLATE
    assert ends(turns, max_length=64) == [END]
    # the limit cuts off answers, some of them possibly after a special token
    assert ends(turns, max_length=12, truncation="right", bad_rows="drop") == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a base model without a template, one step on chats with data.chat_template: all weights, and adapters."""
    folder = tmp_path_factory.mktemp("run")
    tiny_model(folder / "base", num_hidden_layers=1)
    (folder / "base/README.md").write_text(LICENCE)
    (folder / "template.jinja").write_text(CHAT_TEMPLATE)
    pairs = write_jsonl(folder / "pairs.jsonl", chat(arithmetic_pairs(2)))
    for name, rank in (("all", 0), ("adapters", 2)):
        (folder / "config.yaml").write_text(
            f"output: {folder}/{name}\nmodel: {{path: {folder}/base}}\n"
            f"data: {{train: {pairs}, max_length: 64, chat_template: {folder}/template.jinja}}\n"
            f"lora: {{rank: {rank}}}\n"
            "spo: {schedule: sft}\nprecision: {dtype: fp32}\ntraining: {steps: 1, threads: 1}\n"
            "logging: {progress: false}\n"
        )
        assert main(["train", str(folder / "config.yaml")]) == 0
    (folder / "template.jinja").unlink()  # an export no longer needs it
    return folder


@pytest.mark.parametrize(("name", "to"), [("all", "hf"), ("adapters", "hf"), ("adapters", "peft")])
def test_an_export_of_a_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, to: str
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(run / name), str(out), "--to", to]) == 0
    assert f"added {END} to eos_token_id" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(out).chat_template == CHAT_TEMPLATE
    assert GenerationConfig.from_pretrained(out).eos_token_id == [EOS, END]
    card = (out / "README.md").read_text()
    assert str(run) not in card
    data = ModelCard(card).data.to_dict()
    assert "base_model" not in data and data["license"] == "apache-2.0"  # the hub rejects a name that is no hub id
    assert data["library_name"] == ("peft" if to == "peft" else "transformers")
    metrics = [line.split(" | ") for line in card.partition("## Metrics")[2].splitlines() if line.endswith("` |")]
    assert 1 < len(metrics) <= 10 and metrics[0][0] == "| loss"
    assert all(len(cell.strip("`- |").replace(".", "").lstrip("0")) <= 4 for row in metrics for cell in row[1:]), (
        metrics
    )
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(out)
    exec(snippet.replace("max_new_tokens=64", "max_new_tokens=3"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_a_run_to_megatron_and_on_keeps_what_the_export_has(run: Path, tmp_path: Path) -> None:
    convert(run / "all", tmp_path / "hf", "hf")
    convert(run / "all", tmp_path / "megatron", "megatron")
    convert(tmp_path / "megatron", tmp_path / "again", "hf")
    assert side_files(tmp_path / "again") == side_files(tmp_path / "hf")


def test_the_base_model_is_a_hub_id_or_absent(tmp_path: Path) -> None:
    assert hub_id_of("meta-llama/Llama-3.1-8B", tmp_path) == "meta-llama/Llama-3.1-8B"
    assert hub_id_of("gpt2", tmp_path) is None
    (tmp_path / "own").mkdir()
    for name, expected in (("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"), ("/home/me/model", None), (3, None), ("./a/b", None)):
        (tmp_path / "own/config.json").write_text(json.dumps({"_name_or_path": name}))
        assert hub_id_of(str(tmp_path / "own"), tmp_path / "own") == expected
    cached = tmp_path / "models--Qwen--Qwen2.5-7B/snapshots/0123abc"
    cached.mkdir(parents=True)
    assert hub_id_of(str(cached), cached) == "Qwen/Qwen2.5-7B"


def test_names_and_licences(tmp_path: Path) -> None:
    assert base_name("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert base_name(str(tmp_path / "not-there/my-model")) == "my-model"
    cached = tmp_path / "models--Qwen--Qwen2.5-7B/snapshots/0123abc"
    cached.mkdir(parents=True)
    assert base_name(str(cached)) == "Qwen/Qwen2.5-7B"
    assert base_name(os.path.relpath(cached)) == "Qwen/Qwen2.5-7B"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.1\nbase_model: [a]\n---\n")
    assert licence_of(tmp_path) == {"license": "other", "license_name": "llama3.1"}
    for text in ("---\nlicense: [\n---\n", "no header", "---\n- a\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert licence_of(tmp_path) == {}
