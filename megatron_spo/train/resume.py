"""Which keys may change when a run goes on from a checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_spo.config.schema import Config
from megatron_spo.errors import UserError

FREE = ("output", "parallel", "checkpoint", "logging", "reference.cache", "data.eval", "data.num_proc",
        "training.steps", "training.eval_every", "training.threads", "training.time_limit", "training.hang_timeout",
        "training.on_anomaly", "training.spike_factor", "precision.layers")  # fmt: skip
"""Sections and keys that do not alter the trajectory (training.steps: as long as the learning rate is constant), only
where it would have ended (training.on_anomaly, training.spike_factor), or only by rounding (precision.layers)."""


def check_resumable(config: Config, output: Path, found: Path | None) -> None:
    """Refuse to go on from a checkpoint under a config that alters the trajectory.

    Raises:
        UserError: names each key with its old and its new value.
    """
    written = output / "config.yaml"
    if found is None or not written.exists():
        return
    free = FREE if config.optimizer.decay == "constant" else tuple(key for key in FREE if key != "training.steps")
    old = dict(_flat(yaml.safe_load(written.read_text()), free))
    new = dict(_flat(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json", by_alias=True))), free))
    changed = [f"{key}: {old[key]!r} -> {new.get(key)!r}" for key in old if old[key] != new.get(key)]
    if changed:
        raise UserError(f"{found} was trained with another configuration: {'; '.join(changed)}. Restore the keys, or "
                        "choose another output folder")  # fmt: skip


def _flat(values: dict[str, Any], free: tuple[str, ...], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = prefix + name
        if key in free:
            continue
        if isinstance(value, dict):
            yield from _flat(value, free, key + ".")
        else:
            yield key, value
