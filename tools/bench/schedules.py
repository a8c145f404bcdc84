"""`python tools/bench/schedules.py`: what one optimizer step costs under each schedule.

The real `train` command on one thread in fp32, the same random Llama and the same pairs; the schedules take turns.
Memory is the peak of a process of its own above that of `none`, in fp32 copies of the model's parameters, on a wider
model with few tokens.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import measure
from measure import Result, Turn

SCHEDULES = ("none", "sft", "penalty", "dual", "alternating", "lookahead", "barrier")


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each schedule [%(default)s]")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a turn [%(default)s]")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.no_memory = 1, 2, True
    with measure.workplace() as folder:
        results = _seconds(folder / "narrow", options.rounds, options.steps, hidden=64 if options.quick else 256)
        if not options.no_memory:
            results += _memory(folder / "wide")
    measure.report(results, options.json)


def _prepare(folder: Path, *, hidden: int, response: int, steps: int) -> tuple[Path, int]:
    """Model, pairs and reference cache; the configuration and the number of parameters."""
    parameters = measure.write_model(folder / "model", hidden=hidden)
    measure.write_pairs(folder / "pairs.jsonl", 8, prompt=response // 2, response=response)
    config = measure.write_config(folder, training={"global_batch_size": 8, "steps": steps})
    measure.command("reference", str(config))
    return config, parameters


def _seconds(folder: Path, rounds: int, steps: int, *, hidden: int) -> list[Result]:
    config, _ = _prepare(folder, hidden=hidden, response=120, steps=steps)
    runs = itertools.count()

    def train(schedule: str) -> Turn:
        return measure.train(config, folder / f"run-{next(runs)}", f"spo.schedule={schedule}")

    ways = {name: lambda name=name: train(name) for name in SCHEDULES}  # type: ignore[misc]
    needed = {name: measure.seconds(turns) for name, turns in measure.take_turns(ways, rounds).items()}
    return [
        Result(f"schedule/{name}", value / needed["none"], "x", f"{value / (steps - 1):.3f} s a step")
        for name, value in needed.items()
    ]


def _memory(folder: Path) -> list[Result]:
    config, parameters = _prepare(folder, hidden=1280, response=8, steps=2)
    peaks = {name: _peak(config, folder / name, name) for name in SCHEDULES}
    return [
        Result(f"schedule/{name}/memory", (peak - peaks["none"]) / (4 * parameters), "copies")
        for name, peak in peaks.items()
    ]


def _peak(config: Path, output: Path, schedule: str) -> int:
    """Peak memory in bytes of a run in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "megatron_spo",
        "train",
        str(config),
        f"output={output}",
        f"spo.schedule={schedule}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, code, usage = os.wait4(process.pid, 0)
    assert code == 0, command
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
