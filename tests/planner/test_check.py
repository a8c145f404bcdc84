"""`train --check`: what is right and wrong about a run is said without starting it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_spo import cli
from megatron_spo.planner import presets
from tests.support.tiny import arithmetic_pairs, tiny_run, tiny_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    tiny_run(folder, pairs=16, held_out=4, checkpoint={"every": 2})
    shutil.copytree(presets.FOLDER / "Llama-3.3-70B", folder / "70b")
    tiny_tokenizer(folder / "70b")
    return folder


def check(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main(["train", str(folder / "config.yaml"), "--check", *arguments])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_a_run_that_can_start(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = check(folder, capsys, "--gpus", "4", "parallel.tensor=2")
    assert code == 0, text
    for part in (
        "ok     layout         4 GPUs: TP2 PP1, data parallel 2",
        "train: 16 rows; the longest has ",
        f"{folder}/held-out.jsonl: 4 rows",
        "up to 2 at a time",
        "3 of 79 GiB per H100, computed",
        "4 steps",
    ):
        assert part in text, text
    assert "wrong" not in text and not (folder / "run").exists() and not (folder / "cache").exists()


BIG = ["model.init=random", "precision.dtype=bf16", "model.path={folder}/70b"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--gpus", "3", "parallel.tensor=2"], ["3 processes are not a multiple of"]),
        (["--gpus", "4", "parallel.tensor=4"], ["does not divide the model's 2 key-value heads"]),
        ([*BIG, "--gpus", "8"], ["wrong  memory ", "no layout fits on these GPUs"]),
        ([*BIG, "--gpus", "32"], ["wrong  memory ", "these fit: parallel.tensor="]),
        ([*BIG, "--gpus", "32"], ["wrong  disk ", "a checkpoint takes 988 GB", "set a smaller checkpoint.keep"]),
        (["output=/proc/run"], ["wrong  disk ", "/proc cannot be written to"]),
        (["data.train={folder}/bad.jsonl"], ["bad.jsonl line 2: field 'chosen' is missing"]),
        (["data.eval={folder}/none.jsonl"], ["none.jsonl does not exist"]),
        (["model.path=/no/model"], ["there is no such folder"]),
        (["loss.name=sigmoid"], ["it is dpo here"]),
    ],
)
def test_what_is_wrong(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    parts: list[str],
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    write_jsonl(folder / "bad.jsonl", [*arithmetic_pairs(1), {"prompt": "a", "rejected": "b"}])
    code, text = check(folder, capsys, *(one.format(folder=folder) for one in arguments))
    assert code == 2 and "Traceback" not in text
    assert all(part in text for part in parts), text


def test_a_faster_layout_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Full recomputation costs a third of a step."""
    big = [one.format(folder=folder) for one in BIG]
    _, text = check(folder, capsys, *big, "--gpus", "64", "parallel.tensor=8", "parallel.pipeline=8",
                    "parallel.recompute=full", "parallel.sequence=true")  # fmt: skip
    assert "note   layout " in text and "less time: parallel.tensor=" in text


def test_a_machine_without_a_gpu_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "note   this machine   no GPU: a CPU takes" in check(folder, capsys)[1]
    assert "no GPU" not in check(folder, capsys, "--gpus", "2")[1]


def test_gpus_belong_to_the_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(folder / "config.yaml"), "--gpus", "4"]) == 2
    assert "--gpus and --gpu are only used with --check" in capsys.readouterr().err
