"""`python tools/bench/schedules.py`: time and memory of an optimizer step with each schedule.

The `train` command on one thread in fp32, a random Llama, the same pairs at every step. The schedules take turns within
one training run, step by step. Each round of steps gives a ratio to `none`; the result is the median of the ratios.
Memory is the peak of a separate process relative to `none`, in fp32 copies of the model's parameters, for a wider model
with few tokens.
"""

import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import measure
from measure import Result

SCHEDULES = ("none", "sft", "penalty", "dual", "alternating", "lookahead", "barrier")


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="number of timed steps per schedule [%(default)s]")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.no_memory = 1, True
    with measure.workplace() as folder:
        results = _seconds(folder / "narrow", options.rounds, hidden=64 if options.quick else 256)
        if not options.no_memory:
            results += _memory(folder / "wide")
    measure.report(results, options.json)


def _prepare(folder: Path, *, hidden: int, response: int, steps: int) -> tuple[Path, int]:
    """Writes model, pairs and reference cache; returns the configuration file and the number of parameters."""
    parameters = measure.write_model(folder / "model", hidden=hidden)
    measure.write_pairs(folder / "pairs.jsonl", 8, prompt=response // 2, response=response)
    config = measure.write_config(folder, training={"global_batch_size": 8, "steps": steps})
    measure.command("reference", str(config))
    return config, parameters


def _seconds(folder: Path, rounds: int, *, hidden: int) -> list[Result]:
    from megatron_spo.train import loop

    size, step = len(SCHEDULES), loop._step

    def in_turn(job: loop.Training, state: loop.TrainState) -> tuple[loop.TrainState, dict[str, float]]:
        spo = job.config.spo.model_copy(update={"schedule": SCHEDULES[state.step % size]})
        return step(replace(job, config=job.config.model_copy(update={"spo": spo})), state)

    config, _ = _prepare(folder, hidden=hidden, response=120, steps=size * (rounds + 1))
    with measure.replaced(loop, "_step", in_turn):
        seconds = measure.train(config, folder / "run").seconds[size - 1 :]  # the first round is a warm-up
    rows = [seconds[i : i + size] for i in range(0, len(seconds), size)]
    return [
        Result(
            f"schedule/{name}",
            statistics.median(row[i] / row[0] for row in rows),
            "x",
            f"{statistics.median(row[i] for row in rows):.3f} s per step",
        )
        for i, name in enumerate(SCHEDULES)
    ]


def _memory(folder: Path) -> list[Result]:
    config, parameters = _prepare(folder, hidden=1280, response=8, steps=2)
    peaks = {name: _peak(config, folder / name, name) for name in SCHEDULES}
    return [
        Result(f"schedule/{name}/memory", (peak - peaks["none"]) / (4 * parameters), "copies")
        for name, peak in peaks.items()
    ]


def _peak(config: Path, output: Path, schedule: str) -> int:
    """Returns the peak memory in bytes of a run in its own process."""
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
