"""The GPU check: it reports a missing GPU, and its table counts skipped tests as not passed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.processes import ROOT

CASE = '<testcase classname="tests.gpu.test_a" name="test_{}" time="{}">{}</testcase>'
PASSED = CASE.format("one", "1.5", '<properties><property name="loss" value="2e-4"/></properties>')
SKIPPED = CASE.format("two", "0", '<skipped message="needs two GPUs"/>')
FAILED = CASE.format("three", "0", '<failure message="x"/>')


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests machines without a GPU")
def test_without_a_gpu() -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [str(ROOT / "tools/bench/gpu_check.sh")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "this PyTorch finds no NVIDIA GPU, so nothing was checked" in done.stderr
    assert "All required packages are installed." in done.stderr


@pytest.mark.parametrize(("cases", "code"), [(PASSED, 0), (PASSED + SKIPPED, 1), (PASSED + FAILED, 1), ("", 1)])
def test_table(tmp_path: Path, cases: str, code: int) -> None:
    (tmp_path / "gpu.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    table = [sys.executable, str(ROOT / "tools/bench/gpu_table.py"), str(tmp_path / "gpu.xml")]
    done = subprocess.run(table, capture_output=True, text=True, check=False)
    assert done.returncode == code
    lines = [line.split(maxsplit=4) for line in done.stdout.splitlines()]
    if PASSED in cases:
        assert ["a:", "one", "passed", "1.5", "loss 2e-4"] in lines
    if SKIPPED in cases:
        assert ["a:", "two", "skipped", "0", "needs two GPUs"] in lines
    if FAILED in cases:
        assert any(line[1:3] == ["three", "FAILED"] for line in lines)
