"""Trains like `megatron-spo train` and records each rank's peak memory until the last step.

torchrun --nproc-per-node N measured_run.py OUT CONFIG.yaml [section.key=value ...]
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Returns the bytes of memory that this process does not share with others."""
    _, resident, shared, *_ = (int(field) for field in Path("/proc/self/statm").read_text().split())
    return (resident - shared) * PAGE


def watch(run: Path, steps: int, found: dict[str, int]) -> None:
    """Samples until metrics.jsonl has the last step; the memory for saving is not included."""
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"train"') < steps:
        found["most"] = max(found["most"], resident())
        time.sleep(0.02)


def main() -> None:
    from megatron_spo.config.load import load_config
    from megatron_spo.runtime import env
    from megatron_spo.train.run import train

    config = load_config(sys.argv[2], sys.argv[3:], world_size=env.world_size())
    found = {"most": 0}
    steps = config.training.steps or 0
    sampling = threading.Thread(target=watch, args=(Path(config.output), steps, found), daemon=True)
    sampling.start()
    train(config)
    sampling.join()
    Path(sys.argv[1], f"{env.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
