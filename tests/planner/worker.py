"""Counts the memory of this rank in several layouts, one after another.

torchrun --nproc-per-node N worker.py ROWS OUT '{"name": {config}, ...}'
"""

import json
import sys
from pathlib import Path


def main() -> None:
    from megatron_spo.config.model_shape import read_model_shape
    from megatron_spo.config.schema import Config
    from megatron_spo.runtime import env
    from tests.planner.counted import counted

    rows, out, jobs = sys.argv[1:]
    found = {}
    for name, values in json.loads(jobs).items():
        config = Config.model_validate(values)
        found[name] = counted(config, read_model_shape(config.model.path), int(rows))
    (Path(out) / f"{env.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
