"""Runs jobs one after another in each process of one launch; records failures and continues with the next job.

worker.py FOLDER '[["name", "train", ["key=value"]], ...]'
"""

import json
import sys
import traceback
from pathlib import Path


def main() -> None:
    from megatron_spo.config.load import load_config
    from megatron_spo.reference.fill import fill
    from megatron_spo.runtime import env
    from megatron_spo.train.run import train
    from tests.gpu import probes

    folder = Path(sys.argv[1])
    for name, command, overrides in json.loads(sys.argv[2]):
        commands = {"train": train, "reference": fill}
        function = commands[command] if command in commands else getattr(probes, command)
        try:
            config = load_config(folder / "config.yaml", overrides, world_size=env.world_size())
            result = function(config)
        except Exception:
            if env.rank() == 0:
                (folder / f"{name}.error").write_text(traceback.format_exc())
        else:
            if env.rank() == 0 and result is not None:
                (folder / f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
