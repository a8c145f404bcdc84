"""Plans a run without using GPUs; the same as `megatron-spo plan`."""

import sys

if __name__ == "__main__":
    from megatron_spo.cli import main

    sys.exit(main(["plan", *sys.argv[1:]]))
