"""Fills the reference cache of a configuration; the same as `megatron-spo reference`."""

import sys

if __name__ == "__main__":
    from megatron_spo.cli import main

    sys.exit(main(["reference", *sys.argv[1:]]))
