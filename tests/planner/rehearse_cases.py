"""Rehearses the cases of test_rehearsal.py, and introduces faults into the result of the last one.

rehearse_cases.py OUT '{"name": [model, ranks, {parallel}, layers or null], ...}'
"""

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_spo.config.schema import Config
from megatron_spo.planner.presets import shape_of
from megatron_spo.rehearsal.weights import Rehearsal, check, rehearse, summary
from tests.planner.counted import CONFIG

NAME = "model.layers.3.mlp.down_proj.weight"


def main() -> None:
    out, cases = sys.argv[1:]
    found: dict[str, Any] = {}
    for name, (model, ranks, parallel, layers) in json.loads(cases).items():
        config, shape = Config.model_validate({**CONFIG, "parallel": parallel}), shape_of(model)
        if layers is not None:
            shape = replace(shape, layers=layers)
        result = rehearse(config, shape, ranks)
        counts = summary(result, item=2)
        found[name] = {"faults": check(result, config, shape), "ranks": ranks}
        found[name] |= {"numbers": counts["numbers in them"], "parameters": shape.parameters}
        if name == "llama-8b-uneven":
            found["spoilt"] = {kind: check(spoil(result), config, shape) for kind, spoil in SPOILERS.items()}
    Path(out).write_text(json.dumps(found))


def _spoiler(change: Callable[[Rehearsal], object]) -> Callable[[Rehearsal], Rehearsal]:
    def spoil(result: Rehearsal) -> Rehearsal:
        spoilt = replace(
            result,
            readings={**result.readings, NAME: deepcopy(result.readings[NAME])},
            shards=[list(shards) for shards in result.shards],
            held=list(result.held),
        )
        change(spoilt)
        return spoilt

    return spoil


def _shift(result: Rehearsal) -> None:
    reading = next(one for one in result.readings[NAME] if not one.is_main)
    reading.box = tuple((start + 1, stop + 1) for start, stop in reading.box)


def _double(result: Rehearsal) -> None:
    next(one for one in result.readings[NAME] if not one.is_main).is_main = True


def _move(result: Rehearsal) -> None:
    next(one for one in result.readings[NAME] if not one.is_main).stage = 2


def _hold(result: Rehearsal) -> None:
    result.held[5] += 1


SPOILERS = {
    "dropped": _spoiler(lambda result: result.readings[NAME].pop(0)),
    "doubled": _spoiler(_double),
    "shifted": _spoiler(_shift),
    "stranger": _spoiler(_move),
    "shard": _spoiler(lambda result: result.shards[0].pop(5)),
    "parameters": _spoiler(_hold),
}


if __name__ == "__main__":
    main()
