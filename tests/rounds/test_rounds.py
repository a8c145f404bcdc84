"""`megatron-spo rounds`: what a round does, kill -9 in every stage, and which changes are rejected."""

import csv
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_spo.cli import main
from megatron_spo.config.yaml_text import format_yaml
from megatron_spo.evaluate.pairs import evaluate_pairs
from megatron_spo.rounds.spec import read_rounds
from megatron_spo.rounds.stages import groups_of
from tests.support.processes import ROOT, WarmProcess, _environment
from tests.support.tiny import tiny_run, write_jsonl
from tests.support.warm_command import KILL

WARM = f"{sys.executable} {ROOT / 'tests/support/warm_command.py'}"
LAUNCH = ("--launch", WARM, "--launch-one", WARM)
PROMPTS, ROUNDS, SAMPLES, PARTS = 12, 2, 4, 2
STAGES = ["sample-1", "sample-2", "pairs", "reference", "train", "export", "test-t0", "evaluate-t0", "evaluate-pairs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a configuration, prompts, and a scorer that likes the letter e."""
    folder = tmp_path_factory.mktemp("rounds")
    shape = {"num_hidden_layers": 1, "initializer_range": 0.3}
    training = {"global_batch_size": 4, "steps": 12}
    tiny_run(folder, pairs=6, held_out=4, shape=shape, training=training, checkpoint={"every": 1})
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(PROMPTS)]
    write_jsonl(folder / "prompts.jsonl", rows)
    (folder / "likes.py").write_text(
        "def e(prompts, completions, **others):\n    return [float(sum(map(ord, text)) % 7) for text in completions]\n"
    )
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def write(folder: Path, name: str, **changes: Any) -> Path:
    spec: dict[str, Any] = {
        "base": str(folder / "config.yaml"),
        "out": str(folder / name),
        "rounds": ROUNDS,
        "prompts": str(folder / "prompts.jsonl"),
        "prompts_per_round": PROMPTS // ROUNDS,
        "sampling": {"samples": SAMPLES, "max_new_tokens": 6, "parts": PARTS},
        "pairs": {"scorer": "function=likes:e", "unfinished": "reject"},
        "test": {"prompts": str(folder / "prompts.jsonl"), "pairs": str(folder / "held-out.jsonl")},
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(format_yaml(spec))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """Two rounds without an interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["rounds", str(write(folder, "whole")), *LAUNCH, "--at-once", "2"]) == 0
    return folder / "whole"


def table(out: Path) -> list[dict[str, str]]:
    with (out / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_each_round_starts_from_the_model_of_the_one_before(folder: Path, whole: Path) -> None:
    drawn = []
    for number in (1, 2):
        at = whole / f"round-{number}"
        before = folder / "model" if number == 1 else whole / "round-1/model"
        parts = [lines(at / f"prompts-{part}.jsonl") for part in (1, 2)]
        drawn += [row["prompt"] for part in parts for row in part]
        for part, prompts in enumerate(parts, 1):
            answers = lines(at / f"answers-{part}.jsonl")
            assert [row["prompt"] for row in answers] == [row["prompt"] for row in prompts]
            assert all(len(row["responses"]) == SAMPLES for row in answers)
        summary = json.loads((at / "pairs.json").read_text())
        assert summary["prompts"] == PROMPTS // ROUNDS
        assert summary["pairs"] == len(lines(at / "pairs.jsonl")) > 0
        config = (at / "run/config.yaml").read_text()
        assert f"path: {before}\n" in config and f"path: {at}/pairs.jsonl" in config
        provenance = json.loads((at / "run/provenance.json").read_text())
        assert provenance["model"] == str(before)
        assert len(lines(at / "test-t0.jsonl")) == PROMPTS
    assert sorted(drawn) == sorted(row["prompt"] for row in lines(folder / "prompts.jsonl"))  # none twice
    same = [lines(whole / f"round-{i}/answers-1.jsonl")[0]["responses"] for i in (1, 2)]
    assert same[0] != same[1]
    weights = [
        load_file(path / "model.safetensors")
        for path in (folder / "model", whole / "round-1/model", whole / "round-2/model")
    ]
    for one, other in zip(weights, weights[1:], strict=False):
        assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_table_and_the_report(folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(whole)
    assert [row["round"] for row in rows] == ["0", "1", "2"] and {row["state"] for row in rows} == {"done"}
    for number, row in enumerate(rows[1:], 1):
        summary = json.loads((whole / f"round-{number}/pairs.json").read_text())
        assert float(row["share with a pair"]) == summary["prompts_with_pairs"] / summary["prompts"]
        assert int(row["pairs"]) == summary["pairs"]
        found = evaluate_pairs(whole / f"round-{number}/model", folder / "held-out.jsonl", reference=folder / "model")
        shift = found.estimates()["spo/chosen_shift"].value
        assert float(row["pairs spo/chosen_shift"]) == pytest.approx(shift, abs=1e-5) and shift != 0
        scores = json.loads((whole / f"round-{number}/scores-t0.json").read_text())["files"][0]["scores"]
        assert float(row["t0 exact_match"]) == scores["exact_match"]["value"]
        assert float(row["seconds: train"]) > 0 and float(row["seconds: sample"]) > 0
        evals = [line for line in lines(whole / f"round-{number}/run/metrics.jsonl") if line["kind"] == "eval"]
        assert float(row["entropy"]) == evals[-1]["policy/entropy"]
    page = (whole / "report.html").read_text()
    assert all(f'<h2 id="{name}">' in page for name in ("rounds", "time", "results", "curves"))
    stamps = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert main(["rounds", str(folder / "whole.yaml"), *LAUNCH]) == 0  # all is done: nothing runs
    assert "share with a pair" in capsys.readouterr().out
    changed = {path.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed <= {"table.csv", "report.html"}


@pytest.fixture
def killing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(KILL, str(folder / "kill.json"))
    yield folder / "kill.json"


def without_times(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def test_kill_9_in_every_stage(folder: Path, whole: Path, killing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After each kill the same command resumes; the result is that of an uninterrupted call, bit for bit."""
    path = write(folder, "killed", rounds=1)
    at, theirs = folder / "killed/round-1", whole / "round-1"
    stages = {stage.name: stage for group in groups_of(read_rounds(path, []), 1) for stage in group}
    assert list(stages) == STAGES
    for name, stage in stages.items():
        exists = at / "run/checkpoints/latest" if name == "train" else ""  # in the middle of the training
        killing.write_text(json.dumps({"words": " ".join(stage.words), "exists": str(exists)}))
        assert main(["rounds", str(path), *LAUNCH]) == 4, name
        error = capsys.readouterr().err
        assert (
            f"{name} of round 1 was killed by signal 9, perhaps because memory ran out; the same command resumes"
            in error
        )
        assert not killing.exists()  # the signal was sent
    assert main(["rounds", str(path), *LAUNCH]) == 0
    assert "resuming from step_" in (at / "stages/train.log").read_text()
    for name in ("pairs.jsonl", "answers-1.jsonl", "answers-2.jsonl", "test-t0.jsonl"):
        assert (at / name).read_text().replace(str(at), str(theirs)) == (theirs / name).read_text(), name
    assert same_weights(at, theirs)
    assert without_times(table(folder / "killed")) == without_times(table(whole))[:2]


def same_weights(one: Path, other: Path) -> bool:
    mine, theirs = (load_file(folder / "model/model.safetensors") for folder in (one, other))
    return all(torch.equal(mine[name], theirs[name]) for name in theirs)


def started(folder: Path, path: Path, name: str) -> WarmProcess:
    with (folder / f"{name}.log").open("wb") as log:
        return WarmProcess(["-m", "megatron_spo", "rounds", str(path), *LAUNCH], _environment(), log, log)


def wait_for(path: Path, process: WarmProcess) -> None:
    end = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


def test_the_command_itself_is_killed_and_stopped(folder: Path, whole: Path) -> None:
    """After SIGKILL its running command continues, and is not run again; after SIGTERM it saves and ends."""
    path = write(folder, "ended", rounds=1, test={})
    at = folder / "ended/round-1"
    process = started(folder, path, "first")
    wait_for(at / "stages/sample-1.log", process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    again = started(folder, path, "second")
    wait_for(at / "run/checkpoints/latest", again)
    again.terminate()
    said = folder / "second.log"
    assert again.wait() == 75, said.read_text()
    assert "stopped by SIGTERM in round 1, train; the same command resumes" in said.read_text()
    assert "sample-1: megatron-spo generate" not in said.read_text()  # it was waited for
    assert main(["rounds", str(path), *LAUNCH]) == 0
    assert same_weights(at, whole / "round-1")


def test_a_stage_that_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder, "failing", pairs={"scorer": "function=likes:absent"}, test={}, sampling={"max_new_tokens": 2})
    assert main(["rounds", str(path), *LAUNCH]) == 2
    error = capsys.readouterr().err
    assert "pairs of round 1 ended with code 2: the function likes:absent cannot be imported" in error
    assert "round-1/stages/pairs.log" in error and "Traceback" not in error
    assert main(["rounds", str(path), "--table"]) == 0
    assert [row["state"] for row in table(folder / "failing")] == ["unfinished"]


CHANGES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "samples": ({"sampling": {"samples": 5, "max_new_tokens": 6, "parts": 2}}, [], "sampling.samples: 4 -> 5. Restore"),
    "option of pairs": ({"pairs": {"scorer": "function=likes:e", "unfinished": "reject", "margin": 1}}, [],
                        "pairs.margin: 0.0 -> 1.0"),
    "reference": ({"reference": "first"}, [], "reference: 'round' -> 'first'"),
    "base": ({}, ["optimizer.lr=2e-3"], "base: optimizer.lr: 0.001 -> 0.002"),
    "prompts": ({"prompts": "other.jsonl"}, [], "content of prompts: "),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_changed_keys_are_rejected(folder: Path, whole: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    write_jsonl(folder / "other.jsonl", [{"prompt": str(i)} for i in range(PROMPTS)])
    changes, overrides, said = CHANGES[case]
    path = write(folder, "whole", **changes)
    try:
        assert main(["rounds", str(path), *overrides]) == 2
        error = capsys.readouterr().err
        assert f"{whole} was begun with other settings: " in error and said in error, error
    finally:
        write(folder, "whole")


def test_files_may_move(folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "moved").mkdir()
    for name in ("config.yaml", "prompts.jsonl", "held-out.jsonl"):
        shutil.copy(folder / name, folder / "moved" / name)
    at = {"base": "moved/config.yaml", "prompts": "moved/prompts.jsonl"}
    test = {"prompts": "moved/prompts.jsonl", "pairs": "moved/held-out.jsonl"}
    try:
        assert main(["rounds", str(write(folder, "whole", **at, test=test)), *LAUNCH]) == 0, capsys.readouterr().err
    finally:
        write(folder, "whole")


REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"sample": 3}, "sample: unknown key"),
    "value": ({"rounds": 0}, "rounds: 0: must be greater than or equal to 1"),
    "no scorer": ({"pairs": {}}, "pairs.scorer is missing"),
    "option": ({"pairs": {"scorer": "exact_match", "marginn": 1}}, "pairs.marginn is unknown"),
    "samples": ({"sampling": {"samples": 1}}, "sampling.samples: 1: must be greater than or equal to 2"),
    "base": ({"base": "nowhere.yaml"}, "base: nowhere.yaml does not exist"),
    "prompts": ({"prompts": "nowhere.jsonl"}, "prompts: nowhere.jsonl does not exist"),
    "too few": ({"prompts_per_round": 7}, "2 rounds of prompts_per_round = 7 need 14 prompts, but "),
    "model": ({"model": "nowhere"}, "nowhere"),
    "parts": ({"sampling": {"parts": 7}, "test": {}}, "sampling.parts = 7 exceeds the 6 prompts of a round"),
    "folder": ({"out": "model"}, "model exists and was not written by `rounds`"),
    "temperature": ({"test": {"prompts": "prompts.jsonl", "temperatures": [-1.0]}}, "must be 0 (greedy) or positive"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_is_rejected(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    changes, said = REJECTED[case]
    path = write(folder, "rejected", **{"test": {}, "out": str(folder / f"rejected-{case}"), **changes})
    assert main(["rounds", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error, error
    assert not list(folder.glob("rejected-*/round-1/answers*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--processes", "0"], "--processes is 0; must be at least 1"),
        (["--processes", "2", "--launch", "srun"], "--processes and --launch exclude each other"),
        (["--launch-one", "it's"], '--launch-one "it\'s" cannot be split into words'),
    ],
)
def test_wrong_options(folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    assert main(["rounds", str(write(folder, "options")), *options]) == 2
    assert said in capsys.readouterr().err


def test_the_list_of_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder, "listed", reference="first", sampling={"engine": "vllm"})
    assert main(["rounds", str(path), "parallel.tensor=2", "--list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in shown[:2]] == [["0", "test-t0"], ["0", "evaluate-t0"]]
    reference = [line for line in shown if " reference " in line]
    assert f"reference.model={folder}/model" not in reference[0]  # the first round starts from it
    assert f"model.path={folder}/listed/round-1/model" in reference[1]
    assert f"reference.model={folder}/model" in reference[1] and "parallel.tensor=2" in reference[1]
    assert all("--engine vllm" in line for line in shown if "sample-" in line)
    assert not (folder / "listed").exists()


@pytest.mark.parametrize(
    ("override", "reference", "passes"),
    [("loss.name=dpo", "round", 2), ("loss.name=simpo", "round", 0), ("loss.name=simpo", "first", 2)],
)
def test_a_reference_pass_is_made_if_it_is_required(
    folder: Path, capsys: pytest.CaptureFixture[str], override: str, reference: str, passes: int
) -> None:
    base = folder / "uncached.yaml"
    base.write_text((folder / "config.yaml").read_text().replace(f"cache: {folder}/cache", "cache: null"))
    path = write(folder, "uncached-rounds", base=str(base), reference=reference)
    assert main(["rounds", str(path), override, "--list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len([line for line in shown if " reference " in line]) == passes
    assert all("reference.cache=" in line for line in shown if " train " in line) == bool(passes)
