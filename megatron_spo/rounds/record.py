"""The record of the settings of `rounds`: what was begun with one setting is not continued with another."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from megatron_spo.config.load import covers, flat, plain
from megatron_spo.errors import UserError
from megatron_spo.files import write_whole
from megatron_spo.rounds.spec import Rounds

FREE = ("rounds", "out", "base", "prompts", "test.prompts", "test.pairs")
"""Keys that may change; of files, the content counts."""
FREE_IN_BASE = ("output", "model.path", "data.train", "reference", "parallel", "checkpoint", "logging", "data.num_proc",
                "training.threads", "training.time_limit", "training.hang_timeout", "monitor")  # fmt: skip
"""Sections and keys of the base that are set for each round, or that do not change the trained models."""
FILE = "rounds.json"
SHOWN = 6
"""Differences that a message names."""


def check_record(rounds: Rounds) -> None:
    """Writes the settings to OUT/rounds.json, or compares them with those that are there.

    Raises:
        UserError: a setting has changed, or OUT contains something else.
    """
    path, now = rounds.out / FILE, dict(settings_of(rounds))
    if not path.is_file():
        if rounds.out.is_dir() and any(one.name != ".lock" for one in rounds.out.iterdir()):
            raise UserError(f"{rounds.out} exists and was not written by `rounds`; set another `out` in {rounds.path}")
        write_whole(path, json.dumps(now, indent=1))
        return
    before: dict[str, Any] = json.loads(path.read_text())
    differ = [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in sorted(before | now)
              if before.get(key) != now.get(key)]  # fmt: skip
    if differ:
        more = f"; and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        said = "; ".join(differ[:SHOWN]) + more
        raise UserError(f"{rounds.path}: {rounds.out} was begun with other settings: {said}. Restore them, or set "
                        "another `out`")  # fmt: skip


def settings_of(rounds: Rounds) -> Iterator[tuple[str, Any]]:
    """Yields everything that the models depend on, by the name of its key."""
    spec = rounds.spec
    own = {**spec.model_dump(mode="json"), "pairs": rounds.rules.model_dump(mode="json"), "model": str(rounds.first)}
    yield from ((key, value) for key, value in flat(own) if not covers(FREE, key))
    base = dict(flat(plain(rounds.config)))
    yield from ((f"base: {key}", value) for key, value in base.items() if not covers(FREE_IN_BASE, key))
    yield "has a reference", rounds.config.reference.cache is not None
    for key, file in (("prompts", spec.prompts), ("test.prompts", spec.test.prompts), ("test.pairs", spec.test.pairs)):
        if file is not None and Path(file).is_file():
            yield f"content of {key}", xxhash.xxh3_128(Path(file).read_bytes()).hexdigest()
