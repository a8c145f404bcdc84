"""Run by torchrun: counts the collectives of rank 0 in a step of each layout. collectives.py FOLDER OUT.json"""

import json
import sys
from pathlib import Path

from tests.bench.counters import Operators, inside_steps

LAYOUTS = {"tensor": ["parallel.tensor=2"], "pipeline": ["parallel.pipeline=2"], "data": []}
ROWS = (2, 4)
"""Numbers of rows per data-parallel rank and step."""


def main(folder: Path, out: Path) -> None:
    from megatron_spo.config.load import load_config
    from megatron_spo.runtime import env
    from megatron_spo.train import run
    from megatron_spo.train.step import Engine

    step, counts = Engine.train_step, {}
    for name, overrides in LAYOUTS.items():
        for rows in ROWS:
            modes = [Operators(), Operators()]
            setattr(Engine, "train_step", inside_steps(modes))  # noqa: B010
            pairs = rows * (2 if name == "data" else 1)
            own = [f"output={folder}/{name}-{rows}", f"training.global_batch_size={pairs}", *overrides]
            run.train(load_config(str(folder / "config.yaml"), own, world_size=env.world_size()))
            setattr(Engine, "train_step", step)  # noqa: B010
            counts[f"{name} {rows}"] = modes[1].collectives  # of the second step, after the warm-up
    if env.rank() == 0:
        out.write_text(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
