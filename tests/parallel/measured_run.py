"""Trains as `megatron-spo train` does and writes down each rank's largest memory until the last step is done.

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
    """Bytes of this process in memory that it does not share with others."""
    _, resident, shared, *_ = (int(field) for field in Path("/proc/self/statm").read_text().split())
    return (resident - shared) * PAGE


def watch(run: Path, steps: int, found: dict[str, int]) -> None:
    """Sample until the metrics hold the last step; what saving needs is another matter."""
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
