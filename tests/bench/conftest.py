"""Puts the folder of the benchmarks, which are scripts, on the path for these tests."""

import pytest

from tests.support.processes import ROOT


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "bench"))
