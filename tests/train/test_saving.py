"""Saving in the background, and on disks that cannot be written: the training state is never lost."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_spo.checkpoint import save as checkpoint
from megatron_spo.cli import main
from megatron_spo.train import loop
from megatron_spo.train.stop import StopRequest
from tests.support.processes import TIMES, Ranks, largest_difference, launch, read_metrics, steps_done
from tests.support.tiny import arithmetic_pairs, tiny_run, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data and a configuration; the other runs must equal the run `whole` of 6 steps."""
    folder = tmp_path_factory.mktemp("saving")
    tiny_run(
        folder,
        shape={"num_hidden_layers": 2},
        pairs=12,
        held_out=6,
        reference=None,
        loss={"name": "simpo"},
        training={"global_batch_size": 4, "steps": 6},
        checkpoint={"every": 1},
    )
    assert train(folder, folder / "whole") == 0
    return folder


def train(folder: Path, run: Path, *overrides: str) -> int:
    return main(["train", str(folder / "config.yaml"), f"output={run}", *overrides])


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run: Path) -> dict:
    """Returns the measured numbers of all lines."""
    kept = {key: line for key, line in read_metrics(run).items() if key[0] != "alarm"}
    return {key: {name: v for name, v in line.items() if name not in TIMES} for key, line in kept.items()}


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


@contextlib.contextmanager
def small_disk(where: Path, folder: Path, checkpoints: float) -> Iterator[Path]:
    """Mounts a file system with space for `checkpoints` checkpoints next to the other files of a run."""
    one = sum(path.stat().st_size for path in (folder / "whole/checkpoints/step_00000006").iterdir())
    size = 200_000 + int(checkpoints * one)
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def test_megatron_core_says_nothing_about_itself(folder: Path, tmp_path: Path) -> None:
    """Each version deprecates something; a user cannot act on it."""
    command = ["-m", "megatron_spo", "train", str(folder / "config.yaml"), f"output={tmp_path}/run", "training.steps=1"]
    result = launch(command, 1)
    assert result.returncode == 0 and "all 1 steps are done" in result.stdout
    assert not re.search("deprecated|Callers should", result.stderr, re.IGNORECASE), result.stderr


def test_training_goes_on_while_a_checkpoint_is_written(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Each write takes a second while the weights change; the checkpoint must hold the state at the time of the
    save."""
    write, steps_begun = checkpoint._Files._write, []

    def slowly(self):
        time.sleep(1.0)
        write(self)

    step = loop._step

    def noted(job, state):
        steps_begun.append((state.step, job.saver.is_open))
        return step(job, state)

    monkeypatch.setattr(checkpoint._Files, "_write", slowly)
    monkeypatch.setattr(loop, "_step", noted)
    assert train(folder, tmp_path / "run", "checkpoint.every=2") == 0
    assert (3, True) in steps_begun
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    assert (tmp_path / "run/checkpoints/step_00000004").exists()
    assert train(folder, tmp_path / "run") == 0
    assert largest_difference(tmp_path / "run", folder / "whole")[0] == 0.0


def test_both_ways_of_writing_give_the_same_checkpoint(folder: Path, tmp_path: Path) -> None:
    assert train(folder, tmp_path / "run", "checkpoint.async=false") == 0
    for name in ("__0_0.distcp", "__0_1.distcp"):
        ours, theirs = (run / f"checkpoints/step_00000005/{name}" for run in (tmp_path / "run", folder / "whole"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("way", ["true", "false"])
def test_a_full_disk_does_not_end_the_training(folder: Path, tmp_path: Path, way: str, capfd, monkeypatch) -> None:
    """There is space for one and a half checkpoints until saving the last one has failed once."""
    monkeypatch.setattr(loop, "RETRY", 0.5)
    with small_disk(tmp_path / "disk", folder, 1.5) as disk:
        run = disk / "run"
        read: list[str] = []

        def said_so_far() -> str:
            read.append(capfd.readouterr().err)
            return "".join(read)

        def make_room() -> None:
            while not ended.is_set() and "Retrying every" not in said_so_far():
                time.sleep(0.05)
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)

        ended, helper = threading.Event(), threading.Thread(target=make_room)
        helper.start()
        code = train(folder, run, f"checkpoint.async={way}", "checkpoint.keep=1")
        ended.set()
        helper.join()
        assert code == 0
        said = said_so_far()
        assert "training continues" in said.lower()
        assert "free" in said or "No space left" in said
        alarms = [line for line in lines(run) if line["kind"] == "alarm"]
        assert alarms and all("no checkpoint could be written" in line["reason"] for line in alarms)
        assert status(run)["state"] == "done"
        assert status(run)["checkpoint"] == "step_00000006"
        assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []
        assert numbers(run) == numbers(folder / "whole")
        assert train(folder, run, "training.steps=7") == 0


def test_a_disk_that_stays_full_costs_the_last_checkpoint(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(loop, "RETRY", 1.0)
    with small_disk(tmp_path / "disk", folder, 1.5) as disk:
        run = disk / "run"
        assert train(folder, run, "training.hang_timeout=0.05", "checkpoint.every=3") == 5
        said = capsys.readouterr().err
        assert said.count("\nerror: ") == 1
        assert "step 6 could not be saved" in said
        assert "resumes from the previous checkpoint" in said
        assert (status(run)["code"], status(run)["checkpoint"]) == (5, "step_00000003")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert train(folder, run) == 0
        assert numbers(run) == numbers(folder / "whole")


def test_a_read_only_disk_does_not_end_the_training(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    step, done = loop._step, []
    with small_disk(tmp_path / "disk", folder, 9) as disk:

        def remounting(job, state):
            how = {2: "remount,ro", 5: "remount,rw"}.get(state.step)
            if how:
                job.saver.finished(wait=True)
                subprocess.run(["mount", "-o", how, str(disk)], check=True)
                done.append(how)
            return step(job, state)

        monkeypatch.setattr(loop, "_step", remounting)
        assert train(folder, disk / "run") == 0
        assert done == ["remount,ro", "remount,rw"]
        assert "Read-only file system" in capsys.readouterr().err
        measured = [line for line in lines(disk / "run") if line["kind"] == "train"]
        assert [line["step"] for line in measured] == [1, 2, 3, 4, 5, 6]  # delayed lines were written later
        assert status(disk / "run")["checkpoint"] == "step_00000006"


def test_a_vanished_run_directory_comes_back(folder: Path, tmp_path: Path, monkeypatch) -> None:
    step, run = loop._step, tmp_path / "run"

    def removing(job, state):
        if state.step == 4:
            run.rename(tmp_path / "vanished")
        return step(job, state)

    monkeypatch.setattr(loop, "_step", removing)
    assert train(folder, run, "checkpoint.async=false", "logging.report=true") == 0
    assert {"config.yaml", "provenance.json", "status.json", "metrics.jsonl", "report.html"} <= set(os.listdir(run))
    assert main(["convert", str(run), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert train(folder, run, "training.steps=7") == 0


def test_an_output_that_cannot_be_made_is_named(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert train(folder, tmp_path / "file/run") == 2
    said = capsys.readouterr().err
    assert "file/run" in said and "Traceback" not in said


def test_the_best_checkpoint_is_kept(folder: Path, tmp_path: Path) -> None:
    """The learning rate is so large that the held-out loss is lowest before the end."""
    overrides = ["optimizer.lr=0.2", "training.eval_every=1", "checkpoint.every=0", "checkpoint.best=loss/sft"]
    run = tmp_path / "run"
    assert train(folder, run, *overrides, "training.steps=3") == 0
    assert train(folder, run, *overrides) == 0  # the best evaluation so far is part of the checkpoint
    losses = {key[2]: line["loss/sft"] for key, line in read_metrics(run).items() if key[0] == "eval" and key[2] > 0}
    best = min(losses, key=losses.__getitem__)
    assert best not in (5, 6)  # two newest are kept anyway
    assert (run / "checkpoints/best").read_text() == f"step_{best:08d}"
    assert (run / f"checkpoints/step_{best:08d}/trainer.json").exists()
    assert main(["convert", str(run / "checkpoints/best"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert main(["train", str(folder / "config.yaml"), f"output={tmp_path}/x", "data.eval=[]", *overrides[2:]]) == 2


def test_an_evaluation_that_is_owed_after_the_last_step_is_made_once(folder: Path, tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "reason", lambda self, *ahead: "SIGTERM" if "evaluation" in ahead else None)
        assert train(folder, run, "checkpoint.best=loss/sft") == 75
    assert [line["step"] for line in lines(run) if line["kind"] == "eval"] == [0]
    assert train(folder, run, "checkpoint.best=loss/sft") == 0
    assert (run / "checkpoints/best").read_text() == "step_00000006"
    found = [line for line in lines(run) if line["kind"] == "eval"]
    assert train(folder, run, "checkpoint.best=loss/sft") == 0
    assert found == [line for line in lines(run) if line["kind"] == "eval"]  # their seconds too


def test_the_time_limit_counts_evaluation_and_answers_together(folder: Path, tmp_path: Path, monkeypatch) -> None:
    original, jobs = loop.run, []

    def evaluate(job, state):
        time.sleep(0.3)
        return state

    def run(job, state):
        jobs.append(replace(job, answer=lambda state: time.sleep(0.3) or {}))
        return original(jobs[0], state)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    monkeypatch.setattr(loop, "run", run)
    assert train(folder, tmp_path / "run", "training.steps=1") == 0
    assert jobs[0].stop._longest["evaluation"] >= 0.6


def test_changed_keys_are_refused_or_logged(folder: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "whole", run)
    assert train(folder, run, "training.steps=7", "optimizer.lr=2e-3", "loss.beta=3.0") == 2
    assert "optimizer.lr: 0.001 -> 0.002" in capsys.readouterr().err
    assert train(folder, run, "training.steps=7", "optimizer.lr=2e-3", "checkpoint.allow_changed=[optimizer]") == 0
    said = capsys.readouterr().err
    assert "resuming from step_00000006; changed: " in said
    assert "optimizer.lr: 0.001 -> 0.002" in said and "training.steps: 6 -> 7" in said
    assert train(folder, run, "training.steps=8", "optimizer.lr=2e-3") == 0  # the checkpoint now has this rate
    assert train(folder, run, "training.steps=9", "checkpoint.allow_changed=[optimizer.rate]") == 2
    assert "optimizer.rate" in capsys.readouterr().err


def test_changed_rows_are_refused(folder: Path, tmp_path: Path, capsys) -> None:
    run, rows = tmp_path / "run", write_jsonl(tmp_path / "pairs.jsonl", arithmetic_pairs(12))
    given = [f"data.train={rows}", "training.steps=1"]
    assert train(folder, run, *given) == 0
    write_jsonl(rows, arithmetic_pairs(12, seed=5))
    assert train(folder, run, *given[:1], "training.steps=2") == 2
    assert "data.train: the rows differ" in capsys.readouterr().err
    allowed = "checkpoint.allow_changed=[data.train]"
    assert train(folder, run, *given[:1], "training.steps=2", allowed) == 0


def test_no_random_number_is_drawn_by_the_training(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Therefore a checkpoint does not need the state of a random-number generator."""
    states, step = [], loop._step

    def noted(job, state):
        states.append(torch.get_rng_state())
        return step(job, state)

    monkeypatch.setattr(loop, "_step", noted)
    assert train(folder, tmp_path / "run", "training.eval_every=1") == 0
    assert len(states) == 6
    assert all(torch.equal(state, states[0]) for state in states)


def test_a_writer_that_fails_on_one_rank_costs_its_checkpoint_only(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "program.py").write_text(
        "import sys\n"
        "from megatron_spo.checkpoint import save as checkpoint\n"
        "write = checkpoint._Files._write\n"
        "def failing(self):\n"
        "    if 'step_00000002' in (name := self._buckets[0][0]) and '__1_' in name:\n"
        "        self._transforms = None\n"
        "    write(self)\n"
        "checkpoint._Files._write = failing\n"
        "from megatron_spo.cli import main\n"
        "sys.exit(main())\n"
    )
    overrides = [f"output={tmp_path}/run", "parallel.tensor=2", "checkpoint.keep=9"]
    program = tmp_path / "program.py"
    with Ranks(tmp_path / "run", "train", folder / "config.yaml", *overrides, script=program) as job:
        assert job.codes() == [0, 0], job.said(0)
    assert "rank 1: " in job.said(0)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert names == [f"step_0000000{step}" for step in (1, 3, 4, 5, 6)]
    assert steps_done(tmp_path / "run") == 6
