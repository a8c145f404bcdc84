"""Fills the reference cache of a configuration: `megatron-spo reference` under the name of a script."""

import sys

if __name__ == "__main__":
    from megatron_spo.cli import main

    sys.exit(main(["reference", *sys.argv[1:]]))
