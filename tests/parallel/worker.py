"""Runs several commands in one launch of N processes, so that a grid of layouts starts Python once per N.

torchrun --nproc-per-node N worker.py '[["train", "config.yaml", ["key=value"]], ...]'
"""

import json
import sys


def main() -> None:
    from megatron_spo.config.load import load_config
    from megatron_spo.reference.fill import fill
    from megatron_spo.runtime import env
    from megatron_spo.train.run import train

    commands = {"train": train, "reference": fill}
    for command, config, overrides in json.loads(sys.argv[1]):
        commands[command](load_config(config, overrides, world_size=env.world_size()))


if __name__ == "__main__":
    main()
