"""`python tools/bench/schedules.py`: what one optimizer step costs under each schedule.

Each schedule runs in a process of its own, `megatron-spo train` on one thread in fp32, the same random Llama and the
same pairs; the schedules take turns. A step's seconds are the median over all steps but the first. Memory is the
process's peak above that of `none`, in fp32 copies of the model's parameters, on a wider model with few tokens.
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
    with tempfile.TemporaryDirectory() as name:
        for turn in range(options.rounds):
            for schedule in SCHEDULES:
                lines, _ = _train(Path(name), schedule, turn, hidden=512, response=120, steps=options.steps)
                seconds[schedule] += [line["seconds"] for line in lines[1:]]
        peaks = {}
        for schedule in SCHEDULES:
            _, peaks[schedule] = _train(Path(name), schedule, 0, hidden=1280, response=8, steps=2)
        parameters = write_model(Path(name) / "count", hidden=1280)
    print(f"{'schedule':14s}{'seconds':>9s}{'of none':>9s}{'memory (copies of the parameters)':>36s}")
    plain = statistics.median(seconds["none"])
    for schedule, values in seconds.items():
        copies = (peaks[schedule] - peaks["none"]) / (4 * parameters)
        print(f"{schedule:14s}{statistics.median(values):9.3f}{statistics.median(values) / plain:9.2f}{copies:36.2f}")


def _config(folder: Path, steps: int) -> dict:
    return {
        "output": str(folder / "unset"),
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "pairs.jsonl"), "row_length": 2048, "bad_rows": "drop"},
        "reference": {"cache": str(folder / "cache")},
        "spo": {"schedule": "none"},
        "precision": {"dtype": "fp32"},
        "training": {"global_batch_size": 8, "steps": steps, "threads": 1},
        "logging": {"progress": False},
    }


def _train(
    folder: Path, schedule: str, turn: int, *, hidden: int, response: int, steps: int
) -> tuple[list[dict[str, float]], int]:
    """Run in a process of its own; returns the lines of its steps and its peak memory in bytes."""
    work = folder / f"{hidden}"
    if not work.exists():
        write_model(work / "model", hidden=hidden)
        write_pairs(work / "pairs.jsonl", 8, prompt=response // 2, response=response)
        (work / "config.yaml").write_text(json.dumps(_config(work, steps)))
        assert megatron_spo(["reference", str(work / "config.yaml")]) == 0
    run = work / f"{schedule}-{turn}"
    command = [sys.executable, "-m", "megatron_spo", "train", str(work / "config.yaml"), f"output={run}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *SCHEDULES[schedule]], env=environment, stdout=subprocess.DEVNULL)
    _, code, usage = os.wait4(process.pid, 0)
    assert code == 0, command
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return lines, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
