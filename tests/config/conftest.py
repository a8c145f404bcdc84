"""Fixtures: a valid configuration on disk that the tests change."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_spo.config.load import load_config
from megatron_spo.config.schema import Config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes a model folder; keywords replace keys of config.json, None removes a key."""

    def write(**changes: object) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        values = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return write


@pytest.fixture
def config_file(tmp_path: Path, write_model: Callable[..., Path]) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
model: {{path: {write_model()}}}
data: {{train: pairs.jsonl}}
reference: {{cache: cache}}
output: {tmp_path / "run"}
"""
    )
    return path


@pytest.fixture
def load(config_file: Path) -> Callable[..., Config]:
    """Returns a function that loads the configuration with overrides."""

    def load(*overrides: str, world_size: int | None = None) -> Config:
        return load_config(config_file, overrides, world_size=world_size)

    return load
