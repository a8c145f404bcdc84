"""The benchmarks are scripts: their folder is on the path while these tests run."""

import pytest

from tests.support.processes import ROOT


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "bench"))
