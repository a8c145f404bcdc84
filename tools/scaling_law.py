"""Runs studies and fits laws to their tables; the same as `megatron-spo scaling`."""

import sys

if __name__ == "__main__":
    from megatron_spo.cli import main

    sys.exit(main(["scaling", *sys.argv[1:]]))
