"""Runs commands as a user does, in one or several processes.

They are forked from a server that has imported everything once (warm.py), which saves seven seconds of imports per
process. `cold=True` starts a new Python for each process instead, several processes with torchrun.
"""

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from megatron_spo.runtime.clock import PHASES
from tests.support import cost

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
"""Where the processes of the tests find modules: a folder of the caller, such as that of another Megatron-Core, too."""
WORKER = ROOT / "tests" / "parallel" / "worker.py"
WARM_SOCKET = "SPO_TESTS_WARM_SOCKET"
"""Environment variable with the socket of this pytest run's server (tests/conftest.py); without it, all processes are
cold."""
Job = tuple[str, str, list[str]]
"""(command, config file, overrides)"""


class WarmProcess:
    """A process forked by the warm server, with the methods of subprocess.Popen that the tests use."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], stdout: IO[Any], stderr: IO[Any]) -> None:
        self._answers = socket.socket(socket.AF_UNIX)
        self._answers.connect(os.environ[WARM_SOCKET])
        request = {"argv": [str(argument) for argument in arguments], "env": environment, "cwd": os.getcwd()}
        text = json.dumps(request).encode() + b"\n"
        socket.send_fds(self._answers, [text[:1000]], [stdout.fileno(), stderr.fileno()])
        self._answers.sendall(text[1000:])
        self._lines = self._answers.makefile("r")
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None

    def fileno(self) -> int:
        """Returns a descriptor that is readable when the process has ended (for select)."""
        return self._answers.fileno()

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout or 0)
            code, seconds = self._lines.readline().split()
            self.returncode = int(code)
            cost.of_forked_processes += float(seconds)
            self._lines.close()
            self._answers.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it may have ended, and the server not have told us yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


Process = WarmProcess | subprocess.Popen[bytes]


def _environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, "PYTHONWARNINGS": "ignore", **variables}


def _of_rank(rank: int, count: int, port: int) -> dict[str, str]:
    """Returns the environment variables that a launcher sets."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def launch(
    arguments: Sequence[str], processes: int, timeout: int = 900, *, cold: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a Python script or `-m module` with its arguments in `processes` processes, with more variables set.

    Several cold processes are started by torchrun, whose exit code is 1 for every failure. Warm processes have no
    agent; if one fails, the others get a SIGTERM, and the exit code is also 1.
    """
    if not cold and WARM_SOCKET in os.environ:
        return _launch_warm(arguments, processes, timeout, variables)
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        python += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return subprocess.run(
        [*python, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=_environment(**variables),
        check=False,
    )


def _launch_warm(
    arguments: Sequence[str], count: int, timeout: int, variables: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        port, ranks = free_port(), list[WarmProcess]()
        for rank in range(count):
            launcher = _of_rank(rank, count, port) if count > 1 else {}
            ranks.append(WarmProcess(arguments, _environment(**launcher, **variables), stdout, stderr))
        try:
            code = _code_of_all(ranks, timeout)
        finally:
            for process in ranks:
                process.kill()
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(list(arguments), min(code, 1) if count > 1 else code, *texts)


def _code_of_all(ranks: Sequence[WarmProcess], timeout: float) -> int:
    """Returns 0, or the exit code of the first process that failed; the others then get 30 seconds to end."""
    until = time.monotonic() + timeout
    while running := [process for process in ranks if process.poll() is None]:
        if failed := next((process.returncode for process in ranks if process.returncode), 0):
            for process in running:
                process.terminate()
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
            return abs(failed)
        if time.monotonic() > until:
            raise subprocess.TimeoutExpired(f"{len(ranks)} forked processes", timeout)
        select.select(running, [], [], until - time.monotonic())
    return next((process.returncode for process in ranks if process.returncode), 0) or 0


def run_jobs(jobs: Sequence[Job], processes: int, *, cold: bool = False, **variables: str) -> None:
    """Runs train and reference commands one after another in one launch, with more variables set; fails with their
    output."""
    if not jobs:
        return
    done = launch([str(WORKER), json.dumps(jobs)], processes, timeout=3600, cold=cold, **variables)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def cli(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs `megatron-spo ARGUMENTS`."""
    return launch(["-m", "megatron_spo", *arguments], processes)


def read_metrics(run: Path) -> dict[tuple[str, str, int], dict[str, float]]:
    """Returns the lines of metrics.jsonl by (kind, name of the set, step)."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(line.pop("kind"), _name(line), line.pop("step")): line for line in lines}


def _name(line: dict[str, Any]) -> str:
    """Returns the name of the line's set, with the monitor's alarm if it is one (without its text, which rounds); ""
    for training and anomalies."""
    if line.pop("message", ""):
        return f"{line.pop('data')} {line.pop('alarm')} {line.pop('metric')}"
    return str(line.pop("name", "") or (line.pop("data") if "generation/malformed" in line else ""))


TIMES = {"seconds", *(f"seconds/{part}" for part in (*PHASES, "other")), "tokens_per_second", "mfu"}
"""Metrics of speed."""
NOT_COMPARED = {*TIMES, "row_fill"}
"""Metrics of speed and packing, which depend on the layout."""


def largest_difference(got: Path, expected: Path) -> tuple[float, str]:
    """Returns the largest relative difference of two runs over all metrics of all lines, and where it is."""
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
    """Starts a command as srun does: plain processes without an agent."""

    def __init__(
        self,
        folder: Path,
        command: str,
        config: Path,
        *overrides: str,
        count: int = 2,
        script: Path | None = None,
        cold: bool = False,
    ) -> None:
        port = free_port()
        self.errors = [folder / f"rank{rank}.err" for rank in range(count)]
        self.processes: list[Process] = []
        program = ["-m", "megatron_spo"] if script is None else [str(script)]
        arguments = [*program, command, str(config), *overrides]
        for rank in range(count):
            environment = _environment(**_of_rank(rank, count, port))
            with self.errors[rank].open("wb") as errors:
                if not cold and WARM_SOCKET in os.environ:
                    self.processes.append(WarmProcess(arguments, environment, errors, errors))
                    continue
                command_line = [sys.executable, *arguments]
                self.processes.append(subprocess.Popen(command_line, stdout=errors, stderr=errors, env=environment))

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def codes(self, seconds: float = 300) -> list[int]:
        """Returns the exit codes of all ranks, which must end by themselves."""
        return [process.wait(seconds) for process in self.processes]

    def said(self, rank: int) -> str:
        """Returns the output of a rank."""
        return self.errors[rank].read_text()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        """Waits until the condition is true; fails if a process ends before."""
        until = time.monotonic() + seconds
        while not condition():
            ended = [process.poll() for process in self.processes]
            said = "\n".join(self.said(rank)[-3000:] for rank in range(len(ended)))
            assert all(code is None for code in ended), f"{ended}\n{said}"
            assert time.monotonic() < until, said
            time.sleep(0.02)


def free_port() -> int:
    """Returns a free port below the range for outgoing connections, where rank 1, retrying until rank 0 listens, could
    connect to itself."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def steps_done(run: Path) -> int:
    """Returns the last step in metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)
