"""Checkpoints of earlier versions, whose configuration has keys that no longer exist."""

from pathlib import Path
from typing import Any

import pytest

from megatron_spo.checkpoint.compatibility import changes
from megatron_spo.checkpoint.folder import Checkpoint
from megatron_spo.config.load import plain
from megatron_spo.config.schema import Config
from megatron_spo.errors import UserError


def changed(section: str, **keys: Any) -> list[str]:
    """The differences between a checkpoint with these keys and a run of today with the same configuration."""
    today = plain(
        Config.model_validate({"output": "run", "model": {"path": "model"}, "data": {"train": "pairs.jsonl"}})
    )
    old = {**today, section: {**today[section], **keys}}
    return changes(Checkpoint(Path("step_00000001"), {}, {"config": old, "data": {}}), today, {})


def test_removed_keys_with_the_value_that_remained_are_no_difference() -> None:
    assert changed("data", last_batch="keep", drop_ches=0.0) == []
    assert changed("spo", gap_ema=0.9) == []
    assert changed("model", freeze_router=True, router_aux_loss=0.0) == []


def test_removed_keys_with_another_value_are_refused() -> None:
    with pytest.raises(UserError, match="data.last_batch: 'drop' -> None"):
        changed("data", last_batch="drop")
    with pytest.raises(UserError, match="model.freeze_router: False -> None"):
        changed("model", freeze_router=False)
