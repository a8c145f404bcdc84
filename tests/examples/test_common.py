import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from examples import common
from examples.common import StageFailed, Stages


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces started processes; a command with the word `broken` fails."""
    started: list[list[str]] = []

    def run(command: list[str], *, stdout, stderr, env) -> subprocess.CompletedProcess:
        started.append(command[1:])
        failed = "broken" in command
        print("\nerror: it is broken" + "\nnoise" * 20 if failed else "fine", file=stdout, flush=True)
        return subprocess.CompletedProcess(command, 2 if failed else 0)

    monkeypatch.setattr(subprocess, "run", run)
    return started


def open_stages(out: Path, *, fresh: bool = False, seed: int = 0) -> Stages:
    return Stages.open(out, 2, {"seed": seed}, fresh=fresh)


def test_done_stages_are_skipped(tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture) -> None:
    stages = open_stages(tmp_path / "out")
    stages.train("run", Path("a.yaml"), ["x=1"])
    expected = ["-m", "megatron_spo", "train", "a.yaml", f"output={tmp_path}/out/run", "training.threads=1", "x=1"]
    assert commands == [expected]
    (stages.out / "run").mkdir()
    (stages.out / "run" / "status.json").write_text('{"state": "done"}')
    stages.file("answers").write_text("")
    (stages.out / "run-hf").mkdir()
    stages.train("run", Path("a.yaml"), [])
    model = stages.export("run")
    stages.generate("answers", model, Path("prompts"))
    assert len(commands) == 1
    assert "generate-answers: already done" in capsys.readouterr().out


def test_a_failed_command_is_named_with_the_end_of_its_log(tmp_path: Path, commands: list[list[str]]) -> None:
    stages = open_stages(tmp_path / "out")
    with pytest.raises(StageFailed, match="(?s)train-x ended with code 2.*train-x.log.*it is broken"):
        stages.command("train-x", "broken", done=False)
    ran = []
    tasks = [lambda: stages.command("y", "broken", done=False), *[lambda: ran.append(1)] * 50]
    with pytest.raises(StageFailed):
        Stages(stages.out, jobs=1).side_by_side(tasks)
    assert ran == []


def test_several_processes_are_started_by_torchrun(tmp_path: Path, commands: list[list[str]]) -> None:
    open_stages(tmp_path / "out").train("run", Path("a.yaml"), [], processes=2)
    assert commands[0][:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert commands[0][4:7] == ["-m", "megatron_spo", "train"]


def test_other_settings_and_other_folders_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (open_stages(out).file("kept")).write_text("")
    with pytest.raises(StageFailed, match="other settings"):
        open_stages(out, seed=1)
    open_stages(out)
    assert (out / "kept.jsonl").exists()
    open_stages(out, seed=1, fresh=True)
    assert not (out / "kept.jsonl").exists()
    other = tmp_path / "home"
    other.mkdir()
    (other / "thesis.txt").write_text("")
    for fresh in (False, True):
        with pytest.raises(StageFailed, match="not written by this example"):
            open_stages(other, fresh=fresh)
    assert (other / "thesis.txt").exists()


def test_variants_give_one_lambda_to_all_losses() -> None:
    variants = common.variants({"dpo": ("loss.beta=0.1",), "simpo": ()}, 1.5)
    assert list(variants) == ["sft_on_chosen", "dpo", "dpo+spo", "simpo", "simpo+spo"]
    assert variants["sft_on_chosen"] == ["spo.schedule=sft"]
    assert variants["dpo"] == ["loss.name=dpo", "loss.beta=0.1", "spo.schedule=none"]
    assert variants["simpo+spo"][-1] == "spo.lambda=1.5" and "spo.schedule=penalty" in variants["simpo+spo"]


def test_jsonl_round_trip_and_table(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": "é\u2028", "b": 1.5}, {"a": None}]
    common.write_jsonl(tmp_path / "x.jsonl", rows)
    assert common.read_jsonl(tmp_path / "x.jsonl") == rows
    assert json.loads((tmp_path / "x.jsonl").read_text().split("\n")[1]) == {"a": None}
    assert common.text_table(["run", "n"], [["long", "1.0"]]) == "run     n\nlong  1.0"
