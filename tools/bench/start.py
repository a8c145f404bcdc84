"""`python tools/bench/start.py`: start-up time of the commands, each in its own process.

Results are processor seconds, which are longer on a busy machine; compare the ratios. `everything` imports all modules
that a training run may need.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import measure
from measure import Result

COMMANDS = ("train", "reference", "convert", "generate", "evaluate", "plan", "scaling fit", "scaling study", "report",
            "doctor")  # fmt: skip
TORCH = "import torch"
EVERYTHING = """
import torch, megatron.core, datasets, matplotlib.figure, wandb, torch._inductor.compile_fx, torch.utils.tensorboard
from transformers import AutoModelForCausalLM, AutoTokenizer
import megatron_spo.train.run, megatron_spo.evaluate.generate, megatron_spo.report
"""
FIRST_STEP = """
import os, sys
from megatron_spo.cli import main
from megatron_spo.train.run_directory import RunDirectory

def stop(self, kind, step, metrics):
    os._exit(0)

RunDirectory.log = stop
sys.exit(main(sys.argv[1:]) or 1)
"""
"""Runs a command until the first step is logged."""


def main() -> None:
    options = measure.parser(__doc__).parse_args()
    repeats = 1 if options.quick else 3
    given = COMMANDS[:1] if options.quick else COMMANDS
    helped = {name: _seconds([["-m", "megatron_spo", *name.split(), "--help"]], repeats)[0] for name in given}
    with measure.workplace() as folder:
        torch, everything, first, doctor = _seconds(
            [
                ["-c", TORCH],
                ["-c", EVERYTHING],
                ["-c", FIRST_STEP, *_tiny_run(folder)],
                ["-m", "megatron_spo", "doctor"],
            ],
            repeats,
        )
    slowest = max(helped, key=lambda name: helped[name])
    measure.report(
        [
            Result("start/--help", helped[slowest], "s", f"processor time, the slowest: {slowest}"),
            Result("start/doctor", doctor, "s", "processor time"),
            Result("start/train to the end of step 1", first, "s", "processor time"),
            Result("start/step 1 over import torch", first / torch, "x", f"{torch:.2f} s"),
            Result("start/step 1 over everything", first / everything, "x", f"{everything:.2f} s"),
        ],
        options.json,
    )


def _tiny_run(folder: Path) -> list[str]:
    """Writes a tiny model and pairs; returns the arguments of a training run of one step."""
    measure.write_model(folder / "model", hidden=64)
    measure.write_pairs(folder / "pairs.jsonl", 64, prompt=20, response=20)
    config = measure.write_config(folder, training={"steps": 1, "global_batch_size": 8}, reference={"cache": None})
    config.write_text(json.dumps({**json.loads(config.read_text()), "loss": {"name": "simpo"}}))
    return ["train", str(config), f"output={folder}/run"]


def _seconds(ways: Sequence[Sequence[str]], repeats: int) -> list[float]:
    """Returns the processor seconds of each Python process, the least of `repeats`; the processes take turns."""
    taken = [[_run(arguments) for arguments in ways] for _ in range(repeats)]
    return [min(times) for times in zip(*taken, strict=True)]


def _run(arguments: Sequence[str]) -> float:
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, code, usage = os.wait4(process.pid, 0)
    assert code == 0, arguments
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
