"""The thread that reads signals."""

import os
import resource
import signal
import time

import pytest

from megatron_spo.runtime.signals import HANDLED, Signals


def test_signals_are_read_where_many_files_are_open() -> None:
    """select() rejects descriptors above 1023, but large jobs have more open files."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1200:
        pytest.skip("this process may not open 1200 files (ulimit -n)")
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    signals = Signals()
    try:
        with signals.handled():
            signals.after_step()
            os.kill(os.getpid(), signal.SIGUSR1)
            deadline = time.monotonic() + 10
            while signals.requested is None and time.monotonic() < deadline:
                time.sleep(0.01)
    finally:
        for descriptor in held:
            os.close(descriptor)
    assert signals.requested == signal.SIGUSR1


def test_a_forked_child_can_be_terminated_after_handlers_were_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is about to exit keeps its handlers, and a later context then restores these. A child that inherited
    them would ignore SIGTERM, and the pool of tokenisation would wait for it forever."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        for _ in range(2):
            signals = Signals()
            with signals.handled():
                signals.over(2)
            monkeypatch.setenv("WORLD_SIZE", "1")
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
