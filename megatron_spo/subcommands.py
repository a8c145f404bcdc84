"""Runs commands as subprocesses, for commands that consist of several others.

The lock of a command is held by the command itself: if this process is killed, the command continues to its end, and
the next call waits for it instead of starting it a second time.
"""

import contextlib
import fcntl
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PYTHON = [sys.executable]
OURS = [sys.executable, "-m", "megatron_spo"]
STOPPED = 75
"""Exit code of `train` if it was stopped and the same command resumes it."""


@dataclass
class Subcommands:
    """Runs commands, called from several threads."""

    stopping: threading.Event = field(default_factory=threading.Event)
    _processes: set[subprocess.Popen[bytes]] = field(default_factory=set)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Sends a signal to all running commands; `train` then saves and can be resumed. No further one is started."""
        self.stopping.set()
        for process in list(self._processes):
            process.send_signal(number)

    def call(self, words: Sequence[str], log: Path, lock: int) -> int:
        """Runs a command that inherits the descriptor `lock` and writes its output to `log`; returns its exit code."""
        with log.open("wb") as file:
            file.write(f"$ {' '.join(words)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
                start_new_session=True,  # Ctrl-C reaches only this process, which forwards it once
            )
        self._processes.add(process)
        if self.stopping.is_set():
            process.terminate()
        code = process.wait()
        self._processes.discard(process)
        return code

    @contextlib.contextmanager
    def held(self, path: Path) -> Iterator[int]:
        """Yields the lock's file descriptor once no other thread, call or command of a killed call holds it."""
        with path.open("a") as file:
            while not self.stopping.is_set():
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.2)
            yield file.fileno()


def ending(code: int) -> str:
    """Returns how a command ended: its exit code, or the signal that killed it."""
    if 0 <= code <= 128:
        return f"ended with code {code}"
    number = -code if code < 0 else code - 128  # a shell or launcher in between adds 128
    return f"was killed by signal {number}" + (", perhaps because memory ran out" if number == signal.SIGKILL else "")


def reason(log: Path) -> str:
    """Returns a command's error message, or else the last line of its log."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return own[0] if own else lines[-1]
