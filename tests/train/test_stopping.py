"""Runs that are stopped by signals or whose ranks die, with real processes and signals."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Ranks, cli, largest_difference, read_metrics, steps_done
from tests.support.tiny import arithmetic_pairs, tiny_run, write_jsonl

LAYOUTS = {"tp2": ["parallel.tensor=2"], "dp2": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopping")
    tiny_run(
        folder,
        pairs=12,
        held_out=5,
        reference=None,
        loss={"name": "simpo"},
        optimizer={"lr": 1e-4},
        training={"global_batch_size": 4, "steps": 100000, "eval_every": 1},
    )
    return folder


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def ranks(folder: Path, run: str, *overrides: str, command: str = "train", **how: Any) -> Ranks:
    (folder / run).mkdir(exist_ok=True)
    return Ranks(folder / run, command, folder / "config.yaml", f"output={folder}/{run}", *overrides, **how)


def program(path: Path, *changes: str) -> Path:
    """Writes a script that executes these lines and then runs `megatron-spo`."""
    path.write_text("\n".join(["import sys", *changes, "from megatron_spo.cli import main", "sys.exit(main())"]))
    return path


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, [0, 1]), (signal.SIGUSR1, [1]), (signal.SIGINT, [0])])
def test_a_signal_at_any_rank_ends_all_after_the_same_step(folder: Path, number: signal.Signals, at: list[int]) -> None:
    name = number.name
    with ranks(folder, name, "parallel.tensor=2") as job:
        job.wait_for(lambda: steps_done(folder / name) >= 3)
        for rank in at:
            job.processes[rank].send_signal(number)
        assert job.codes() == [75, 75], job.said(0)
    found = status(folder / name)
    assert (found["state"], found["code"]) == ("stopped", 75)
    assert name in found["reason"]
    assert found["checkpoint"] == f"step_{found['step']:08d}"
    assert (folder / name / "checkpoints" / found["checkpoint"] / "trainer.json").exists()
    assert f"stopped after step {found['step']}" in job.said(0)
    steps = found["step"] + 2
    options = [str(folder / "config.yaml"), f"training.steps={steps}"]
    assert cli("train", *options, f"output={folder}/{name}").returncode == 0
    assert cli("train", *options, f"output={folder}/{name}-whole").returncode == 0
    assert largest_difference(folder / name, folder / f"{name}-whole")[0] < 1e-4  # evaluations included


def test_a_second_signal_ends_at_once_even_in_a_collective(folder: Path) -> None:
    with ranks(folder, "twice") as job:
        job.wait_for(lambda: steps_done(folder / "twice") >= 2)
        job.processes[1].send_signal(signal.SIGSTOP)  # rank 0 waits for it in the next all-reduce
        job.processes[0].send_signal(signal.SIGINT)
        job.wait_for(lambda: "SIGINT: ending after this step" in job.said(0))
        job.processes[0].send_signal(signal.SIGINT)
        assert job.processes[0].wait(3) == 130
    assert status(folder / "twice")["state"] == "stopped"


def test_a_signal_during_start_up_ends_at_once(folder: Path) -> None:
    with ranks(folder, "early", cold=True) as job:
        job.wait_for(lambda: (folder / "early/status.json").exists())
        job.processes[1].send_signal(signal.SIGTERM)
        assert job.codes(30) == [75, 75], job.said(0)
    assert "SIGTERM" in job.said(0) + job.said(1)
    assert "Traceback" not in job.said(0) + job.said(1)
    assert status(folder / "early")["state"] == "stopped"


def test_a_rank_that_ends_while_it_waits_for_another_says_why(folder: Path) -> None:
    """Before the first step, SIGTERM ends a process even if it hangs in a collective; the others end with the same
    reason."""
    script = program(
        folder / "held_up.py",
        "from megatron_spo.runtime import signals",
        "signals.UNWINDING = 0.5",
        "signals.signals.after_step = lambda: None  # as if the steps never began",
    )
    with ranks(folder, "held-up", script=script) as job:
        job.wait_for(lambda: (folder / "held-up/status.json").exists())
        job.processes[0].send_signal(signal.SIGSTOP)
        job.processes[1].send_signal(signal.SIGTERM)
        assert job.processes[1].wait(20) == 75, job.said(1)
        job.processes[0].send_signal(signal.SIGCONT)
        assert job.codes(20) == [75, 75], job.said(0)
    assert "rank 1 (host" in job.said(0) and "SIGTERM" in job.said(0)


def test_the_time_limit_saves_before_it(folder: Path) -> None:
    with ranks(folder, "limit", "training.time_limit=0.2") as job:
        assert job.codes() == [75, 75], job.said(0)
    found = status(folder / "limit")
    assert "time_limit" in found["reason"]
    assert found["step"] == steps_done(folder / "limit") > 0


@pytest.mark.parametrize(
    ("layout", "victim"),
    [("tp2", 0), ("dp2", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("tp2", 1), ("dp2", 0)))],
)
def test_a_killed_rank_is_named_and_ends_the_others(folder: Path, layout: str, victim: int) -> None:
    run = f"killed-{layout}-{victim}"
    with ranks(folder, run, *LAYOUTS[layout]) as job:
        job.wait_for(lambda: steps_done(folder / run) >= 2)
        job.processes[victim].kill()
        assert job.processes[1 - victim].wait(20) == 4, job.said(1 - victim)
    assert f"rank {victim} (host" in job.said(1 - victim)
    assert "it died" in job.said(1 - victim)
    assert "Traceback" not in job.said(1 - victim)
    assert status(folder / run)["state"] == "failed"
    assert f"rank {victim} " in status(folder / run)["reason"]


def test_a_stopped_rank_is_named_and_ends_the_others(folder: Path) -> None:
    script = program(folder / "impatient.py", "from megatron_spo.runtime import watchdog", "watchdog.SILENCE = 10.0")
    layout = "parallel.tensor=2"
    with ranks(folder, "frozen-dp2", script=script) as one, ranks(folder, "frozen-tp2", layout, script=script) as two:
        for job, run, victim in ((one, "frozen-dp2", 1), (two, "frozen-tp2", 0)):
            job.wait_for(lambda: steps_done(folder / run) >= 2)  # noqa: B023 (called at once)
            job.processes[victim].send_signal(signal.SIGSTOP)
        for job, victim in ((one, 1), (two, 0)):
            assert job.processes[1 - victim].wait(90) == 4
            assert f"rank {victim} (host" in job.said(1 - victim)
            assert "has not answered for 10 seconds" in job.said(1 - victim)


def test_a_rank_that_lives_but_does_nothing_is_named(folder: Path) -> None:
    os.mkfifo(folder / "nobody-writes-here")
    script = program(
        folder / "stuck.py",
        "from megatron_spo.train import step; from megatron_spo.runtime.env import rank",
        "given, sweep = [], step.Engine._sweep",
        "def held_up(self, *a, **k):",
        "    given.append(1)",
        f"    if rank() == 1 and len(given) == 9: open({str(folder / 'nobody-writes-here')!r})",
        "    return sweep(self, *a, **k)",
        "step.Engine._sweep = held_up",
    )
    with ranks(folder, "stuck", "training.hang_timeout=0.1", script=script) as job:
        assert job.codes() == [4, 4]
    assert "no progress for 0.1 minutes" in job.said(0)
    assert "waits for rank 1 (host" in job.said(0)
    assert "held_up" in job.said(0)
    assert status(folder / "stuck")["state"] == "failed"


def test_a_bug_at_one_rank_does_not_leave_the_others_waiting(folder: Path) -> None:
    script = program(
        folder / "bug.py",
        "from megatron_spo.train import step; from megatron_spo.runtime.env import rank",
        "if rank() == 1: step.named_metrics = None",
    )
    with ranks(folder, "bug", script=script) as job:
        assert job.codes() == [4, 1]
    assert "TypeError" in job.said(1)
    assert "rank 1 (host" in job.said(0)
    assert "TypeError" in job.said(0)
    assert "TypeError" in status(folder / "bug")["reason"]


def test_reference_stops_at_once_and_goes_on(folder: Path) -> None:
    write_jsonl(folder / "many.jsonl", arithmetic_pairs(6000, seed=2))
    given = [f"data.train={folder}/many.jsonl", f"reference.cache={folder}/cache"]
    parts = folder / "cache"
    with ranks(folder, "reference", *given, command="reference") as job:
        job.wait_for(lambda: len(list(parts.glob("train-*/parts/*.part"))) >= 2)
        job.processes[1].send_signal(signal.SIGUSR1)
        assert job.codes(40) == [75, 75], job.said(0) + job.said(1)
    assert "Traceback" not in job.said(0) + job.said(1)
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("train-*/parts/*.part")}
    assert kept
    done = cli("reference", str(folder / "config.yaml"), f"output={folder}/x", *given)
    assert done.returncode == 0, done.stderr
    assert "already complete" not in done.stdout
    assert not list(parts.glob("train-*/parts"))


@pytest.mark.slow
def test_torchrun_hands_on_its_signals(folder: Path) -> None:
    import subprocess

    from tests.support.processes import PYTHONPATH, sys

    run = folder / "torchrun"
    arguments = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    arguments += ["--rdzv-endpoint", "127.0.0.1:0", "-m", "megatron_spo", "train", str(folder / "config.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    agent = subprocess.Popen(
        [sys.executable, *arguments, f"output={run}"], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        while steps_done(run) < 2:
            assert agent.poll() is None
            time.sleep(0.05)
        agent.terminate()
        assert agent.wait(60) != 0  # the agent has its own exit code
    finally:
        agent.kill()
    assert status(run)["state"] == "stopped"
    assert status(run)["checkpoint"] == f"step_{status(run)['step']:08d}"
    assert read_metrics(run)
