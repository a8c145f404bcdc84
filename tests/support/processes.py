"""Commands as a user starts them: in processes of their own, one or several."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_spo.runtime.clock import PHASES

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "parallel" / "worker.py"
Job = tuple[str, str, list[str]]
"""(command, config file, overrides)"""


def launch(
    arguments: Sequence[str], processes: int, timeout: int = 900, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python script or `-m module` with its arguments in so many processes, with further variables set."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        python += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    environment.update(variables)
    return subprocess.run(
        [*python, *arguments], capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )


def run_jobs(jobs: Sequence[Job], processes: int) -> None:
    """Run train and reference commands one after another in one launch; fails with what they printed."""
    done = launch([str(WORKER), json.dumps(jobs)], processes)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def cli(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run `megatron-spo ARGUMENTS`."""
    return launch(["-m", "megatron_spo", *arguments], processes)


def read_metrics(run: Path) -> dict[tuple[str, str, int], dict[str, float]]:
    """Lines of metrics.jsonl by (kind, name of the set, step)."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(line.pop("kind"), _name(line), line.pop("step")): line for line in lines}


def _name(line: dict[str, Any]) -> str:
    """Of the set, and of the monitor's alarm (without its text, which rounds); "" for training and for anomalies."""
    if line.pop("message", ""):
        return f"{line.pop('data')} {line.pop('alarm')} {line.pop('metric')}"
    return str(line.pop("name", "") or (line.pop("data") if "generation/malformed" in line else ""))


TIMES = {"seconds", *(f"seconds/{part}" for part in (*PHASES, "other")), "tokens_per_second", "mfu"}
"""How fast."""
NOT_COMPARED = {*TIMES, "row_fill"}
"""How fast and in what rows: the layout's business."""


def largest_difference(got: Path, expected: Path) -> tuple[float, str]:
    """Largest relative difference of two runs over all metrics of all lines, and where it is."""
    ours, theirs = read_metrics(got), read_metrics(expected)
    assert ours.keys() == theirs.keys()
    worst = (0.0, "nowhere")
    for key, line in theirs.items():
        assert ours[key].keys() == line.keys(), key
        for name in line.keys() - NOT_COMPARED:
            difference = abs(ours[key][name] - line[name]) / max(1.0, abs(line[name]))
            worst = max(worst, (difference, f"{name} at {key}"))
    return worst


class Ranks:
    """A command as srun starts it: plain processes without an agent that watches them."""

    def __init__(
        self, folder: Path, command: str, config: Path, *overrides: str, count: int = 2, script: Path | None = None
    ) -> None:
        port = _free_port()
        self.errors = [folder / f"rank{rank}.err" for rank in range(count)]
        self.processes: list[subprocess.Popen[bytes]] = []
        program = ["-m", "megatron_spo"] if script is None else [str(script)]
        arguments = [sys.executable, *program, command, str(config), *overrides]
        for rank in range(count):
            environment = {
                **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore",
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            with self.errors[rank].open("wb") as errors:
                self.processes.append(subprocess.Popen(arguments, stdout=errors, stderr=errors, env=environment))

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def codes(self, seconds: float = 300) -> list[int]:
        """Exit codes of all, which must come by themselves."""
        return [process.wait(seconds) for process in self.processes]

    def said(self, rank: int) -> str:
        """What a rank wrote."""
        return self.errors[rank].read_text()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        """Wait until something has happened; fails when a process ends first."""
        until = time.monotonic() + seconds
        while not condition():
            ended = [process.poll() for process in self.processes]
            said = "\n".join(self.said(rank)[-3000:] for rank in range(len(ended)))
            assert all(code is None for code in ended), f"{ended}\n{said}"
            assert time.monotonic() < until, said
            time.sleep(0.02)


def _free_port() -> int:
    """Below the range for outgoing connections: rank 1, calling until rank 0 listens, could there reach itself."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def steps_done(run: Path) -> int:
    """The last step in metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)
