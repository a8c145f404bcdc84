"""Counts what this rank of a launch holds in several layouts, one after another.

torchrun --nproc-per-node N worker.py MODEL ROWS OUT '{"name": {config}, ...}'
"""

import json
import sys
from pathlib import Path


def main() -> None:
    from megatron_spo.config.model_shape import read_model_shape
    from megatron_spo.config.schema import Config
    from megatron_spo.runtime import env
    from tests.planner.counted import counted

    shape = read_model_shape(sys.argv[1])
    jobs = {name: Config.model_validate(values) for name, values in json.loads(sys.argv[4]).items()}
    found = {name: counted(config, shape, int(sys.argv[2])) for name, config in jobs.items()}
    (Path(sys.argv[3]) / f"{env.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
