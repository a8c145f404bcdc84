"""Converts a checkpoint: `megatron-spo convert` under the name of a script."""

import sys

if __name__ == "__main__":
    from megatron_spo.cli import main

    sys.exit(main(["convert", *sys.argv[1:]]))
