"""Converts a checkpoint; the same as `megatron-spo convert`."""

import sys

if __name__ == "__main__":
    from megatron_spo.cli import main

    sys.exit(main(["convert", *sys.argv[1:]]))
