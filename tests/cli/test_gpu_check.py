"""The GPU check: it reports a missing GPU, and its dry run executes everything up to the first call that needs one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.processes import ROOT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests machines without a GPU")


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)


def lines_of(path: Path) -> dict[str, tuple[str, str]]:
    """Returns name -> (result, what was measured)."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return {name: (result, measured) for name, result, measured in rows}


def test_without_a_gpu(tmp_path: Path) -> None:
    done = run(str(ROOT / "tools/bench/gpu_check.sh"), "--out", str(tmp_path))
    assert done.returncode == 2
    assert lines_of(tmp_path / "results.txt")["GPU"][0] == "FAILED"
    assert "this PyTorch finds no NVIDIA GPU, so nothing was checked" in done.stdout
    assert "All required packages are installed." in done.stderr


@pytest.mark.parametrize("given", [["--minutes", "x"], ["--wheels", "nowhere"], ["--quick"], ["--out"]])
def test_wrong_options(given: list[str]) -> None:
    done = run(str(ROOT / "tools/bench/gpu_check.sh"), *given)
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1)


def test_each_test_writes_a_line(tmp_path: Path) -> None:
    results = tmp_path / "results.txt"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu/test_attention.py"]
    done = run(*command, SPO_GPU_RESULTS=str(results), SPO_GPU_DRY="1")
    assert done.returncode == 0, done.stdout[-3000:]
    lines = lines_of(results)
    assert len(lines) == 3
    assert set(lines.values()) == {("reached", "reached the first call that needs a GPU")}


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    done = run(str(ROOT / "tools/bench/gpu_check.sh"), "--dry", "--out", str(tmp_path), "--minutes", "30")
    lines = lines_of(tmp_path / "results.txt")
    assert done.returncode == 0, done.stdout
    assert {result for result, _ in lines.values()} == {"ok", "reached"}
    assert lines["quickstart, 3 steps of dpo+spo in fp32: loss"][0] == "ok"
    assert lines["benchmark, bf16-torch: cache = policy"][1].startswith("bit for bit")
    assert lines["benchmark, fp8-tensorwise"][0] == "reached"
    assert lines["test_numbers.py::test_fp32_equals_the_cpu[fp32]"][0] == "ok"
