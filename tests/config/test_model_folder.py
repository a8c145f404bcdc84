"""Model folders: every command reads the weights that transformers would use, or names what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_spo.cli import main
from megatron_spo.config.model_folder import check_folder, stored_tensors
from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.errors import UserError
from megatron_spo.model.hf_files import model_tensors
from tests.support.tiny import arithmetic_pairs, tiny_model, write_jsonl

Change = Callable[[Path], object]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX, NORM, HEAD = "model.safetensors.index.json", "model.norm.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    tiny_model(folder, num_hidden_layers=1)
    return folder


@pytest.fixture
def whole(original: Path, tmp_path: Path) -> Path:
    """Returns a folder with one weight file."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def sharded(whole: Path) -> Path:
    """Returns a folder with two weight files and an index."""
    shard(whole)
    return whole


def shard(folder: Path) -> None:
    """Splits the weights of a folder into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {FIRST: names[::2], SECOND: names[1::2]}
    for file, part in parts.items():  # without metadata in the header, as some programs write them
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def edit_json(name: str, **changes: Any) -> Change:
    """Returns a change: replace entries of a JSON file; None removes an entry."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        content = {key: value for key, value in (content | changes).items() if value is not None}
        (folder / name).write_text(json.dumps(content))

    return change


def edit_map(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        content["weight_map"] |= {name.replace("__", "."): file for name, file in changes.items()}
        (folder / INDEX).write_text(json.dumps(content))

    return change


def edit_file(file: str, **changes: torch.Tensor | None) -> Change:
    """Returns a change: replace tensors of a file (names with __ instead of dots); None removes a tensor."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / file) if (folder / file).exists() else {}
        for name, tensor in changes.items():
            tensors.pop(name.replace("__", "."), None)
            if tensor is not None:
                tensors[name.replace("__", ".")] = tensor
        save_file(tensors, folder / file)

    return change


def write(file: str, content: bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(content)


def cut(file: str, by: int) -> Change:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-by])


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


OVERLAP = header(
    b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, '
    b'"b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}'
)
SHORT = header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (write(INDEX, b'{"metadata": {}, "weight_map": {"a'), f"{INDEX}: not readable as JSON"),
        (write(INDEX, b"[]"), f"{INDEX}: must be a JSON object"),
        (write(INDEX, b"\xff\xfe"), f"{INDEX}: not readable as JSON"),
        (edit_json(INDEX, metadata=None), f"{INDEX}: 'metadata' must be"),
        (edit_json(INDEX, weight_map=None), f"{INDEX}: 'weight_map' must be"),
        (edit_json(INDEX, weight_map=[]), f"{INDEX}: 'weight_map' must be"),
        (edit_json(INDEX, weight_map={}), f"{INDEX} names no tensors"),
        (edit_map(model__norm__weight=3), f"assigns {NORM} to 3"),
        (edit_map(model__norm__weight="../model.safetensors"), f"assigns {NORM} to '../model"),
        (edit_map(model__norm__weight="model-00003-of-00003.safetensors"), "names model-00003-of-00003.safetensors"),
        (lambda folder: (folder / SECOND).unlink(), f"names {SECOND}, which does not exist"),
        (edit_map(model__norm__extra=FIRST), f"assigns model.norm.extra to {FIRST}, which does not contain it"),
        (edit_file(FIRST, model__norm__weight=torch.ones(32)), f"{NORM} is in both {FIRST} and {SECOND}"),
        (edit_file("model.safetensors", model__norm__weight=torch.ones(32)), "contains two sets of weights"),
        (cut(SECOND, 1), f"{SECOND} has .* bytes instead of"),
        (write(SECOND, b""), f"{SECOND} is damaged"),
        (write(SECOND, (2**60).to_bytes(8, "little")), f"{SECOND} is damaged"),
        (write(SECOND, header(b"[1]")), f"{SECOND} is damaged"),
        (write(SECOND, OVERLAP + b"123"), f"{SECOND} is damaged .its tensors overlap"),
        (write(SECOND, SHORT + b"1234"), "where size and shape do not match"),
        (write("generation_config.json", b"{"), "generation_config.json: not readable as JSON"),
        (edit_json("generation_config.json", eos_token_id="end"), "eos_token_id = 'end'; must be a token id"),
        (edit_json("config.json", transformers_weights=FIRST), "transformers_weights = .* is not supported"),
        (edit_json("config.json", tie_word_embeddings="yes"), "tie_word_embeddings = 'yes'; must be true or false"),
        (edit_json("config.json", tie_word_embeddings=True), f"{HEAD} differs from model.embed_tokens.weight"),
        (edit_json("config.json", model_type=None), "model_type = None; must be the name"),
        (write("config.json", b'{"model_type": '), "config.json: not readable as JSON"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: file does not exist"),
    ],
)  # fmt: skip
def test_refused_by_name(sharded: Path, change: Change, message: str) -> None:
    change(sharded)
    with pytest.raises(UserError, match=message):
        check_folder(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit_file("model.safetensors", model__norm__weight=None), f"lacks the tensor {NORM}"),
        (edit_file("model.safetensors", model__norm__weight=torch.ones(31)), rf"{NORM} has shape \(31,\)"),
        (edit_file("model.safetensors", model__extra=torch.ones(2)), "holds model.extra"),
        (
            edit_file("model.safetensors", model__norm__weight=torch.ones(32).int()),
            f"{NORM} has data type I32, which is not",
        ),
        (edit_json("config.json", num_hidden_layers=2), "lacks the tensor model.layers.1."),
        (edit_json("config.json", vocab_size=261), r"embed_tokens.weight has shape \(262, 32\)"),
    ],
)
def test_another_model_than_that_of_the_config(
    whole: Path, change: Change, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(whole)
    with pytest.raises(UserError, match=message):
        model_tensors(whole, read_model_shape(whole))
    assert_commands_refuse(whole, ["generate", "evaluate"], capsys)


def test_shards_hold_what_the_whole_file_held(original: Path, sharded: Path) -> None:
    """A tensor that the index does not list is read, as in transformers; unused entries are harmless."""
    edit_map(**{"model__layers__0__self_attn__rotary_emb__inv_freq": FIRST})(sharded)
    index = json.loads((sharded / INDEX).read_text())
    del index["weight_map"][NORM]
    (sharded / INDEX).write_text(json.dumps(index))
    check_folder(sharded)
    expected, theirs = load_file(original / "model.safetensors"), AutoModelForCausalLM.from_pretrained(sharded)
    found = stored_tensors(sharded)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        content = found[name].file.read_bytes()[found[name].start : found[name].stop]
        assert torch.equal(torch.frombuffer(bytearray(content), dtype=torch.float32).view(found[name].shape), tensor)
        assert torch.equal(theirs.state_dict()[name], tensor)


def test_a_head_of_its_own_beside_tied_embeddings(whole: Path) -> None:
    """A head that differs is rejected, because not all programs use it; an equal head is accepted."""
    ids = torch.arange(20)[None]
    untied = AutoModelForCausalLM.from_pretrained(whole)(ids).logits
    edit_json("config.json", tie_word_embeddings=True)(whole)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(whole)(ids).logits, untied)
    with pytest.raises(UserError, match="differs"):
        check_folder(whole)
    embedding = load_file(whole / "model.safetensors")["model.embed_tokens.weight"]
    edit_file("model.safetensors", lm_head__weight=embedding.clone())(whole)
    check_folder(whole)
    assert model_tensors(whole, read_model_shape(whole))[1] == [HEAD]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit_json("config.json", tie_word_embeddings=True), "differs from model.embed_tokens.weight"),
        (write(INDEX, b"{"), f"{INDEX}: not readable as JSON"),
        (cut("model.safetensors", 3), "bytes instead of"),
    ],
)
def test_every_command_refuses(whole: Path, change: Change, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    change(whole)
    assert_commands_refuse(whole, ["train", "reference", "generate", "evaluate", "convert", "plan"], capsys, message)


def assert_commands_refuse(
    model: Path, commands: list[str], capsys: pytest.CaptureFixture[str], message: str = ""
) -> None:
    """Each command ends with exit code 2 and names what is wrong."""
    folder = model.parent
    pairs = write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(2))
    config = folder / "config.yaml"
    config.write_text(
        f"output: {folder}/run\nmodel: {{path: {model}}}\ndata: {{train: {pairs}, max_length: 64}}\n"
        f"reference: {{cache: {folder}/cache}}\nprecision: {{dtype: fp32}}\n"
        "training: {global_batch_size: 2, steps: 1, threads: 1}\nlogging: {progress: false}\n"
    )
    arguments: dict[str, list[object]] = {
        "train": [config],
        "reference": [config],
        "generate": [model, "--prompts", pairs, "--out", folder / "answers"],
        "evaluate": ["--model", model, "--pairs", pairs],
        "convert": [model, folder / "out", "--to", "megatron"],
        "plan": [config, "--gpus", "1", "--gpu", "h100"],
    }
    for command in commands:
        assert main([command, *map(str, arguments[command])]) == 2, command
        said = capsys.readouterr().err
        assert "error: " in said and message in said, command
