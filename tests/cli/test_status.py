"""`megatron-spo status` of runs, of a job's folder with the files that slurm/lib.sh writes, and of studies."""

import json
import re
from pathlib import Path

import pytest

from megatron_spo.cli import main
from tests.report.full_run import make_full_run


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["status", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The answer of a `squeue` that stands first on the path; without the file, SLURM does not know the job."""
    answer, program = tmp_path / "answer", tmp_path / "bin/squeue"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat {answer} 2>/dev/null\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return answer


def running(folder: Path, **more: object) -> Path:
    run = make_full_run(folder)
    status = {"state": "running", "step": 40, "steps": 180, "checkpoint": "step_00000040", "phase": "training", **more}
    (run / "status.json").write_text(json.dumps(status))
    return run


def test_a_running_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, running(tmp_path / "run"))
    assert f"{tmp_path}/run: running, step 60 of 180, left 2 min" in text
    assert re.search(r"^  speed      (0\.9\d|1) s/step$", text, re.MULTILINE)
    for part in (
        "alarms     1, the last: step 30",
        "checkpoint step_00000040",
        "now        training",
        "held_out   loss ",
    ):
        assert part in text, text


def test_a_run_that_failed_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = running(tmp_path / "run", state="failed", code=3, reason="the loss is not a finite number")
    text = said(capsys, run, "--watch", "5")  # it has ended, so this ends as well
    assert "run: failed, step 60 of 180\n" in text and "ended      code 3: the loss is not a finite number" in text


def test_a_job_that_waits_and_runs(tmp_path: Path, queue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    (out / "logs/owner").write_text("17\n")
    log = "2026-01-01 10:00:00 job 16.0: starts on n9\n2026-01-01 10:00:00 job 17.0: starts on n[1-2]; logs in x\n"
    (out / "logs/job.log").write_text(log)
    queue.write_text("PENDING|(Resources)\n")
    assert "out: waiting" in (text := said(capsys, out))
    assert "job        17, attempt 1: waits for free nodes" in text
    (out / "logs/job.log").write_text(log + "2026-01-01 11:00:00 job 17.1: reference: 2 x 8 processes: megatron-spo\n")
    (out / "logs/reference.log").write_text(
        "0: reference pass over train: 14,000/60,000 pairs  200 pairs/s  left 4 min\n3: warning: something\n"
    )
    queue.write_text("RUNNING|n[1-2]\n")
    text = said(capsys, out)
    assert "out: starting" in text and "job        17, attempt 2: RUNNING n[1-2]" in text
    assert "last message: reference: 2 x 8 processes" in text
    assert "reference pass over train: 14,000/60,000 pairs  200 pairs/s  left 4 min" in text
    running(out / "run", state="stopped", code=75, reason="SIGUSR1: stopped after step 60, everything is saved")
    queue.write_text("PENDING|(BeginTime)\n")
    text = said(capsys, out)
    assert "out: waiting, step 60 of 180" in text and "waits for its begin time" in text and "code 75: SIGUSR1" in text
    queue.unlink()
    assert "out: stopped, step 60 of 180" in (text := said(capsys, out)) and "not in the queue" in text


def test_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running(tmp_path / "2/run")
    make_full_run(tmp_path / "10/run", falls=False)
    (tmp_path / "3").mkdir()
    (tmp_path / "3/failure.json").write_text(json.dumps({"step": "train", "code": 2, "reason": "unknown key"}))
    text = said(capsys, tmp_path)
    lines = [line.split()[:2] for line in text.splitlines()]
    assert lines[1:4] == [["2", "running"], ["3", "failed"], ["10", "done"]]
    assert "60/180" in text.splitlines()[1]
    assert "train ended with code 2: unknown key" in text
    assert text.endswith("3 runs: 1 running, 1 failed, 1 done\n")


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["status", str(tmp_path), "--watch", "0"]) == 2
    assert "--watch 0 must be positive" in capsys.readouterr().err
