"""Rehearses the 70B model of examples/llama3_70b on 32 GPUs; the same as `megatron-spo rehearse`."""

import sys
from pathlib import Path

CONFIG = Path(__file__).parent.parent / "examples" / "llama3_70b" / "config.yaml"

if __name__ == "__main__":
    from megatron_spo.cli import main

    sys.exit(main(["rehearse", str(CONFIG), "--gpus", "32", *sys.argv[1:]]))
