"""Starts the server that forks the tests' processes, records the cost of each test, and sorts the tests."""

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.cost import Costs
from tests.support.processes import PYTHONPATH, WARM_SOCKET

_server = pytest.StashKey[subprocess.Popen[bytes]]()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Costs())
    if hasattr(config, "workerinput"):  # a pytest-xdist worker uses the server of the main process
        return
    os.environ[WARM_SOCKET] = f"{tempfile.mkdtemp()}/warm"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, "PYTHONWARNINGS": "ignore"}
    script = Path(__file__).parent / "support" / "warm.py"
    config.stash[_server] = subprocess.Popen([sys.executable, str(script), os.environ[WARM_SOCKET]], env=environment)
    while not os.path.exists(os.environ[WARM_SOCKET]):  # created when the server listens
        assert config.stash[_server].poll() is None


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # commands collect garbage at their start, which need not scan imported modules


def pytest_unconfigure(config: pytest.Config) -> None:
    if server := config.stash.get(_server, None):
        server.kill()
        server.wait()


LONGEST_FIRST = ("slurm", "parallel", "examples", "bench", "train")
"""Folders whose modules take longest; if they started last, one pytest-xdist worker would wait for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.parent.name, len(places)))
