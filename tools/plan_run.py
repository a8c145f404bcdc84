"""Plans a run before a GPU is touched: `megatron-spo plan` under the name of a script."""

import sys

if __name__ == "__main__":
    from megatron_spo.cli import main

    sys.exit(main(["plan", *sys.argv[1:]]))
