"""Configuration files, overrides and error messages."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_spo.config.load import dump_config, load_config
from megatron_spo.config.losses import LOSS_SPECS
from megatron_spo.config.schema import Config
from megatron_spo.config.yaml_text import format_yaml, parse_yaml
from megatron_spo.errors import UserError

Load = Callable[..., Config]


def test_defaults_are_resolved(load: Load) -> None:
    config = load()
    assert config.loss.name == "dpo"
    assert config.loss.parameters() == {"beta": 0.1, "label_smoothing": 0.0}
    assert (config.training.steps, config.training.epochs) == (None, 1.0)
    assert config.data.max_length == 512  # the model's own limit, below the default of 2048
    assert [source.path for source in config.data.train] == ["pairs.jsonl"]


def test_overrides_are_yaml(load: Load) -> None:
    config = load(
        "data.train=[a.jsonl, {path: b.jsonl, weight: 2}]",
        "optimizer.lr=1e-4",
        "optimizer.betas=[0.9, 0.95]",
        "spo.lambda=2",
        "training.seed=1_000",
        "logging.wandb=off",
        "reference.cache=2024-01-01",
        "model.tokenizer=null",
    )
    assert [(source.path, source.weight) for source in config.data.train] == [
        ("a.jsonl", 1.0),
        ("b.jsonl", 2.0),
    ]
    assert config.optimizer.lr == 1e-4
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.spo.lambda_ == 2.0
    assert config.training.seed == 1000
    assert config.logging.wandb == "off"
    assert config.reference.cache == "2024-01-01"


def test_numbers_in_a_file_are_numbers(config_file: Path) -> None:
    config_file.write_text(config_file.read_text() + "optimizer:\n  lr: 1e-4\n  eps: 1.e-9\nspo:\n")
    assert load_config(config_file).optimizer.lr == 1e-4
    assert load_config(config_file).optimizer.eps == 1e-9


@pytest.mark.parametrize("name", LOSS_SPECS)
@pytest.mark.parametrize("schedule", ["none", "sft", "penalty", "dual", "alternating"])
def test_dump_reloads_to_the_same(load: Load, tmp_path: Path, name: str, schedule: str) -> None:
    unit = ["spo.lambda_unit=token"] if schedule in ("penalty", "dual") else []
    config = load(f"loss.name={name}", f"spo.schedule={schedule}", "training.steps=7", *unit)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert "lambda_:" not in again.read_text()


@pytest.mark.parametrize("text", ["off", "1e5", "null", "1.5", "2024-01-01", "yes", "~", "a: b", "", "0x10", "ü"])
def test_strings_stay_strings(text: str) -> None:
    import yaml

    assert parse_yaml(format_yaml({"key": text})) == {"key": text}
    assert yaml.safe_load(format_yaml({"key": text})) == {"key": text}  # and for readers of YAML 1.1


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("spo.schedul=none", ["spo.schedul", "did you mean 'spo.schedule'"]),
        ("loss.lambda=3", ["loss.lambda", "did you mean 'spo.lambda'"]),
        ("lr=3", ["did you mean 'optimizer.lr'"]),
        ("optimiser.lr=3", ["optimiser", "did you mean 'optimizer'"]),
        ("zzz.y=3", ["zzz", "allowed keys: output, model, data"]),
        ("model.zzz=3", ["model.zzz", "allowed keys: path, init, tokenizer"]),
        ("spo.schedule=penalti", ["spo.schedule = 'penalti'", "'lookahead' or 'barrier'"]),
        ("loss.name=dpos", ["loss.name = 'dpos'", "'simpo'"]),
        ("optimizer.lr=0", ["optimizer.lr = 0", "greater than 0"]),
        ("optimizer.lr=.nan", ["optimizer.lr = nan", "finite"]),
        ("optimizer.lr=fast", ["optimizer.lr = 'fast'", "number"]),
        ("optimizer.betas=[0.9,1.5]", ["optimizer.betas[1] = 1.5", "less than 1"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas"]),
        ("training.steps=1.5", ["training.steps = 1.5", "integer"]),
        ("training.steps=true", ["training.steps = True", "integer"]),
        ("training.global_batch_size='8'", ["training.global_batch_size = '8'", "integer", "pairs"]),
        ("data.shuffle=1", ["data.shuffle = 1", "boolean"]),
        ("data.train=[]", ["data.train"]),
        ("data.train=[{path: a, wieght: 2}]", ["data.train[0].wieght", "did you mean 'weight'"]),
        ("data.train=[3]", ["data.train[0] = 3"]),
        ("model.path=3", ["model.path = 3", "string"]),
        ("output=", ["output = None", "string"]),
        ("spo=3", ["spo is a section"]),
        ("training.steps", ["section.key=value"]),
        ("model.path=[", ["not valid YAML"]),
    ],
)
def test_wrong_override(load: Load, override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        load(override)
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_every_mistake_gets_its_line(load: Load) -> None:
    with pytest.raises(UserError) as raised:
        load("optimizer.lr=-1", "spo.lamda=1", "checkpoint.keep=0")
    lines = str(raised.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("command line: ") for line in lines)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "must be a YAML mapping with sections"),
        ("- a\n", "must be a YAML mapping with sections"),
        ("model: {path: a\n", "not valid YAML: line 2"),
        ("output: a\noutput: b\n", "duplicate key 'output'"),
        ("output: a\ndata:\n  train: a\n  train: b\n", "line 4, column 3: duplicate key 'train'"),
        ("model: {path: a}\ndata: {train: b}\n", "output is missing"),
        ("model:\ndata: {train: b}\noutput: c\n", "model.path is missing"),
        ("model: 3\ndata: {train: b}\noutput: c\n", "model = 3"),
        ("3: 4\nmodel: {path: a}\ndata: {train: b}\noutput: c\n", "unknown key '3'"),
        ("[a]: b\n", "a key must be a plain word"),
    ],
)
def test_wrong_file(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="bad.yaml") as raised:
        load_config(path)
    assert part in str(raised.value)


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="configuration file does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot read the configuration"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read the configuration"):
        load_config(tmp_path / "binary.yaml")


def test_import_is_light() -> None:
    code = (
        "import sys; import megatron_spo.config.load, megatron_spo.config.document;"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'megatron'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
