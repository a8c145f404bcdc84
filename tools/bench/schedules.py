"""`python tools/bench/schedules.py`: what one optimizer step costs under each schedule.

Each schedule runs in a process of its own, `megatron-spo train` on one thread in fp32, the same random Llama and the
same pairs; the schedules take turns. A step's seconds are the median over all steps but the first; memory is the
process's peak above that of `none`, in fp32 copies of the model's parameters.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from run import write_model, write_pairs

from megatron_spo.cli import main as megatron_spo

SCHEDULES = {
    "none": [],
    "sft": ["spo.schedule=sft"],
    "penalty": ["spo.schedule=penalty"],
    "dual": ["spo.schedule=dual"],
    "alternating": ["spo.schedule=alternating"],
    "lookahead": ["spo.schedule=lookahead"],
    "barrier": ["spo.schedule=barrier"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each schedule [%(default)s]")
    parser.add_argument("--steps", type=int, default=7, help="optimizer steps of a turn [%(default)s]")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in SCHEDULES}
    peaks: dict[str, list[int]] = {name: [] for name in SCHEDULES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = write_model(folder / "model", hidden=512)
        write_pairs(folder / "pairs.jsonl", 8, prompt=60, response=120)
        (folder / "config.yaml").write_text(json.dumps(_config(folder, options.steps)))
        assert megatron_spo(["reference", str(folder / "config.yaml")]) == 0
        for turn in range(options.rounds):
            for schedule, overrides in SCHEDULES.items():
                run = folder / f"{schedule}-{turn}"
                peaks[schedule].append(_train(folder / "config.yaml", [f"output={run}", *overrides]))
                lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                seconds[schedule] += [line["seconds"] for line in lines[1:]]
    print(f"{'schedule':14s}{'seconds':>9s}{'of none':>9s}{'memory (copies of the parameters)':>36s}")
    plain, least = statistics.median(seconds["none"]), statistics.median(peaks["none"])
    for schedule, values in seconds.items():
        copies = (statistics.median(peaks[schedule]) - least) / (4 * parameters)
        print(f"{schedule:14s}{statistics.median(values):9.3f}{statistics.median(values) / plain:9.2f}{copies:36.2f}")


def _config(folder: Path, steps: int) -> dict:
    return {
        "output": str(folder / "unset"),
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "pairs.jsonl"), "row_length": 2048},
        "reference": {"cache": str(folder / "cache")},
        "spo": {"schedule": "none"},
        "precision": {"dtype": "fp32"},
        "training": {"global_batch_size": 8, "steps": steps, "threads": 1},
        "logging": {"progress": False},
    }


def _train(config: Path, overrides: list[str]) -> int:
    """Run in a process of its own; returns its peak memory in bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_spo", "train", str(config), *overrides]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, code, usage = os.wait4(process.pid, 0)
    assert code == 0, command
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
