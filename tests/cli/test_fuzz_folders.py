"""Damaged model folders: every command that reads them fails with one message that names the folder or the key.

If a command accepts a folder, transformers must read the same shape from config.json and the same weights. The messages
for each damage are tested in tests/config/test_model_folder.py; here hypothesis draws damage and command. The commands
are stopped before they start to compute.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_spo.config.model_folder import CONFIG, GENERATION_CONFIG, INDEX, WEIGHTS, stored_tensors
from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.errors import UserError
from megatron_spo.evaluate import generate, pairs
from megatron_spo.reference import fill as reference
from megatron_spo.train import run
from tests.cli.test_fuzz import Capture, cheap
from tests.config.test_model_folder import FIRST, SECOND, Change, cut, edit_file, edit_json, edit_map, shard, write
from tests.support.tiny import arithmetic_pairs, tiny_model, write_jsonl

COMMANDS = ("train", "reference", "plan", "generate", "evaluate", "convert")
TRANSFORMERS = ("generate", "evaluate")
"""Commands that use transformers."""
KEYS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act",
        "rope_parameters", "rope_theta", "rope_scaling", "tie_word_embeddings", "attention_bias", "mlp_bias",
        "initializer_range", "eos_token_id", "bos_token_id", "pad_token_id", "dtype", "architectures",
        "quantization_config", "transformers_weights", "partial_rotary_factor", "sliding_window",
        "layer_types")  # fmt: skip
VALUES = (None, "x", "", -1, 0, 1, 3, 1.5, float("nan"), True, False, [], ["x"], {}, {"rope_type": "yarn"}, 2**40)
ABSENT = object()


class Accepted(UserError):
    """Raised when a command has accepted the folder and would start to compute."""


def with_value(key: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        content.pop(key, None)
        (folder / CONFIG).write_text(json.dumps(content if value is ABSENT else {**content, key: value}))

    return change


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def smaller_vocabulary(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    cut_ones = {name: tensors[name][:20].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    edit_file(WEIGHTS, **cut_ones)(folder)
    with_value("vocab_size", 20)(folder)


def norm(file: str, tensor: torch.Tensor | None) -> Change:
    return edit_file(file, model__norm__weight=tensor)


DAMAGE: list[tuple[Change, tuple[str, ...]]] = [  # and the commands that accept it
    *((write(file, content), ()) for file in (CONFIG, GENERATION_CONFIG) for content in (b"", b"{", b"[]", b"\xff")),
    *((write(WEIGHTS, content), ()) for content in (b"", b"{}", b"\0" * 8, b"\xff" * 99)),
    *((cut(WEIGHTS, by), ()) for by in (1, 4000)),
    (edit_json(GENERATION_CONFIG, eos_token_id="end"), ()),
    (lambda folder: (folder / CONFIG).unlink(), ()),
    (norm(WEIGHTS, None), ()),
    (norm(WEIGHTS, torch.ones(31)), ()),
    (norm(WEIGHTS, torch.ones(32, dtype=torch.int32)), ()),
    (norm(WEIGHTS, torch.ones(32).to(torch.float8_e4m3fn)), ()),
    (edit_file(WEIGHTS, model__extra=torch.ones(2)), ()),
    (with_value("tie_word_embeddings", True), ()),
    *((with_value(key, value), ()) for key in ("num_hidden_layers", "vocab_size", "intermediate_size")
      for value in (2**31, 1.5, 3, 0)),
    (smaller_vocabulary, ("plan", "convert")),
    (with_value("max_position_embeddings", 16), ("convert",)),
    *((both(shard, change), ()) for change in (
        edit_map(model__norm__weight="absent.safetensors"), edit_map(model__norm__weight=WEIGHTS),
        edit_map(model__norm__weight=3), edit_map(model__norm__extra=FIRST), edit_json(INDEX, weight_map=None),
        edit_json(INDEX, metadata=None), write(INDEX, b"{"), norm(FIRST, torch.ones(32)), cut(SECOND, 1),
        norm(WEIGHTS, torch.ones(32)), lambda folder: (folder / FIRST).unlink())),
]  # fmt: skip
INPUTS = pytest.mark.parametrize("inputs", [16, pytest.param(150, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    tiny_model(folder / "good", num_hidden_layers=1)
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(2))
    config = {
        "output": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "pairs.jsonl"), "max_length": 64},
        "reference": {"cache": str(folder / "cache")},
        "precision": {"dtype": "fp32"},
        "training": {"global_batch_size": 2, "steps": 1, "threads": 1},
        "logging": {"progress": False},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True)
def nothing_is_computed(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(*given: object, **more: object) -> None:
        raise Accepted("accepted")

    for where, name in (
        (run, "make_model"),
        (reference, "make_model"),
        (generate, "generate"),
        (pairs, "score_pairs"),
    ):
        monkeypatch.setattr(where, name, accept)
    monkeypatch.setattr(run, "announce_memory", lambda *given: None)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(job / "datasets"))


class Folder:
    """Creates a copy of the valid folder with a change."""

    def __init__(self, job: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], object]) -> None:
        self.model, self._capture = job / "model", Capture(capsys)
        shutil.rmtree(self.model, ignore_errors=True)
        shutil.copytree(job / "good", self.model)
        change(self.model)

    def accepted(self, command: str, key: str = "") -> bool:
        """Returns whether a command accepts the folder; otherwise checks that there is one message."""
        job = self.model.parent
        for made in ("out", "run", "cache"):
            shutil.rmtree(job / made, ignore_errors=True)
        given: dict[str, list[object]] = {
            "train": [job / "config.yaml", "loss.name=cpo", "reference.cache=null"],
            "reference": [job / "config.yaml"],
            "plan": [job / "config.yaml", "--gpus", 1, "--gpu", "h100"],
            "generate": [
                self.model,
                "--prompts",
                job / "pairs.jsonl",
                "--out",
                job / "answers",
                "--max-new-tokens",
                20,
            ],
            "evaluate": ["--model", self.model, "--pairs", job / "pairs.jsonl", "--max-length", 64],
            "convert": [self.model, job / "out", "--to", "megatron"],
        }
        code, error = self._capture.run(command, *given[command])
        if code == 0 or "error: accepted" in error:
            return True
        assert code == 2 and error.count("error: ") == 1 and "Traceback" not in error, (command, code, error)
        assert any(part in error for part in (str(self.model), "data.max_length", key or "\0")), (command, error)
        assert not (job / "out").exists() and not (job / "answers").exists(), (command, error)
        return False

    def computes_as_transformers(self, command: str) -> None:
        """Checks that shape and weights are the same in transformers, and that all weights are stored."""
        again = self.model.parent / "again"
        again.mkdir(exist_ok=True)
        AutoConfig.from_pretrained(self.model).to_json_file(again / CONFIG, use_diff=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto", output_loading_info=True)
        if command not in TRANSFORMERS:
            shapes = [replace(read_model_shape(folder), raw={}) for folder in (self.model, again)]
            assert shapes[0] == shapes[1], command
        model, info = loaded
        assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]), (command, info)
        state = model.state_dict()
        for file in {tensor.file for tensor in stored_tensors(self.model).values()}:
            for name, tensor in load_file(file).items():
                assert torch.equal(state[name].float(), tensor.float()), (command, name)


@INPUTS
def test_damaged_folders(job: Path, capsys: pytest.CaptureFixture[str], inputs: int) -> None:
    @cheap(inputs)
    @given(st.sampled_from(range(len(DAMAGE))), st.sampled_from(COMMANDS))
    def check(which: int, command: str) -> None:
        change, harmless = DAMAGE[which]
        assert Folder(job, capsys, change).accepted(command) == (command in harmless), (which, command)

    check()


@INPUTS
def test_values_of_config_json(job: Path, capsys: pytest.CaptureFixture[str], inputs: int) -> None:
    @cheap(inputs)
    @given(st.sampled_from(KEYS), st.sampled_from([ABSENT, *VALUES]), st.sampled_from(COMMANDS))
    def check(key: str, value: Any, command: str) -> None:
        folder = Folder(job, capsys, with_value(key, value))
        if folder.accepted(command, key):
            folder.computes_as_transformers(command)

    check()


@INPUTS
def test_bytes_put_into_files(job: Path, capsys: pytest.CaptureFixture[str], inputs: int) -> None:
    """Changes bytes of JSON files and of the header of the weights. Other bytes are always valid numbers."""

    @cheap(inputs)
    @given(
        st.sampled_from([CONFIG, GENERATION_CONFIG, INDEX, FIRST]),
        st.integers(0, 10**6),
        st.binary(min_size=1, max_size=2),
        st.integers(0, 2),
        st.sampled_from(COMMANDS),
    )
    def check(file: str, place: int, new: bytes, cut_off: int, command: str) -> None:
        def change(folder: Path) -> None:
            shard(folder)
            good = (folder / file).read_bytes()
            length = 8 + int.from_bytes(good[:8], "little") if file == FIRST else len(good)
            at = place % length
            (folder / file).write_bytes(good[:at] + new + good[at + cut_off :])

        folder = Folder(job, capsys, change)
        if folder.accepted(command, "model"):
            folder.computes_as_transformers(command)

    check()


def test_the_good_folder_is_accepted(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for change in (lambda folder: None, shard):
        folder = Folder(job, capsys, change)
        for command in COMMANDS:
            assert folder.accepted(command), command
        folder.computes_as_transformers("train")
