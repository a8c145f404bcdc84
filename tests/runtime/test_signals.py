"""The thread that reads signals."""

import os
import resource
import signal
import time

import pytest

from megatron_spo.runtime.signals import Signals


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
