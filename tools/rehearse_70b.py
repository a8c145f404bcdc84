"""Rehearses the 70B of examples/llama3_70b on 32 GPUs: `megatron-spo rehearse` under the name of a script."""

import sys
from pathlib import Path

CONFIG = Path(__file__).parent.parent / "examples" / "llama3_70b" / "config.yaml"

if __name__ == "__main__":
    from megatron_spo.cli import main

    sys.exit(main(["rehearse", str(CONFIG), "--gpus", "32", *sys.argv[1:]]))
