"""Handles SIGTERM, SIGUSR1 (SLURM's warning) and SIGINT (Ctrl-C): the first signal requests an orderly stop, the second
ends the process at once.

Python runs its handlers only between bytecodes of the main thread, which may wait in a collective for minutes.
Therefore a thread reads the signals from the wake-up descriptor, to which the interpreter's C handler writes at once.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from enum import Enum
from threading import Thread
from types import FrameType
from typing import Any

from megatron_spo.errors import Stopped
from megatron_spo.runtime import env

LOG = logging.getLogger(__name__)

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO = 1.0
"""Seconds within which torchrun's agent repeats a Ctrl-C that the terminal has already sent; both count as one."""
UNWINDING = 5.0
"""Seconds that the main thread has to react if a signal ends the process at once."""


class _Mode(Enum):
    AT_ONCE = "there is nothing to save"
    UNWINDING = "the main thread was told to stop"
    AFTER_STEP = "the training loop checks `requested` after each step"
    OVER = "the process is exiting with a fixed exit code"


class Signals:
    """The signals that this process received; does nothing until `handled` is entered."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        """The first signal received."""
        self.before_exit: Callable[[int, str], None] = _nothing
        """Called with exit code and reason before the process ends at once."""
        self.tell_others: Callable[[int, str], None] = _nothing
        """Called after `before_exit`, so that the other processes of the job end for the same reason instead of
        reporting this one as dead."""
        self._mode, self._code, self._came = _Mode.AT_ONCE, Stopped.code, 0.0

    def after_step(self) -> None:
        """From now on, the first signal is only recorded in `requested`."""
        self._mode = _Mode.AFTER_STEP

    @property
    def is_over(self) -> bool:
        """Whether `over` was called."""
        return self._mode is _Mode.OVER

    def over(self, code: int) -> None:
        """Declares that the process is about to exit with this code; a further signal does not change the code."""
        self._mode, self._code = _Mode.OVER, code

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handles the three signals within the context; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.requested, self._mode, self.before_exit = None, _Mode.AT_ONCE, _nothing
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        thread = Thread(target=self._read, args=(reader,), name="signals", daemon=True)
        thread.start()
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._in_main_thread) for number in HANDLED}
        try:
            yield
        finally:
            if self._mode is not _Mode.OVER or env.world_size() == 1:  # else a later signal could change the exit code
                self._restore(before, writer, thread)

    def _restore(self, before: dict[signal.Signals, Any], writer: socket.socket, thread: Thread) -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        writer.close()  # ends the thread
        thread.join()

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if self._mode is _Mode.AT_ONCE:
            self._mode = _Mode.UNWINDING
            raise Stopped(_name(number))

    def _read(self, reader: socket.socket) -> None:
        came = select.poll()  # unlike select(), it accepts descriptors above 1023
        came.register(reader, select.POLLIN)
        while True:
            unwinding = self.requested is not None and self._mode is not _Mode.AFTER_STEP
            if not came.poll(1000 * UNWINDING if unwinding else None):
                self._exit(self._code, f"{_name(self.requested or 0)}, while the main thread was blocked")
            numbers = reader.recv(64)
            if not numbers:
                reader.close()
                return
            for number in numbers:
                if number in HANDLED:
                    self._came_in(signal.Signals(number))

    def _came_in(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._came = number, now
            if self._mode is _Mode.AFTER_STEP and env.rank() == 0:
                LOG.info(f"{number.name}: ending after this step; a second signal ends at once")
        elif self._mode is not _Mode.OVER and not (
            number == self.requested and env.has_agent() and now - self._came < ECHO
        ):
            self._exit(128 + number, f"{number.name}, the second signal")

    def _exit(self, code: int, reason: str) -> None:
        with contextlib.suppress(Exception):
            LOG.info(f"stopped by {reason}")
            self.before_exit(code, reason)
        with contextlib.suppress(Exception):
            self.tell_others(code, f"stopped by {reason}")
        os._exit(code)


def _nothing(code: int, reason: str) -> None:
    return None


def _name(number: int) -> str:
    return signal.Signals(number).name if number else "a signal"


_forking = threading.local()


def _before_fork() -> None:
    """Holds signals back: Python forgets one that its handler receives in a child before `_in_forked_child`."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)


def _in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_forked_child() -> None:
    """Resets signal handling in a forked child (tokenisation), whose signals would go to its parent's descriptor.

    The child ignores Ctrl-C and SLURM's warning: its parent decides when it ends.
    """
    if getattr(signal.getsignal(signal.SIGTERM), "__func__", None) is Signals._in_main_thread:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_forked_child)

signals = Signals()
"""The signals of this process; a process has only one set of handlers."""
