"""A folder with a model, data and a configuration for studies of short runs."""

from pathlib import Path

import pytest

from tests.support.tiny import tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    tiny_run(
        folder,
        shape={"num_hidden_layers": 1},
        pairs=32,
        held_out=8,
        reference=None,
        loss={"name": "simpo"},
        training={"global_batch_size": 4, "eval_every": 2},
        logging=None,
    ).rename(folder / "base.yaml")
    return folder
