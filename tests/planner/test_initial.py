"""`megatron-spo init`: the configuration that it prints trains; lengths, layout and batch suit model and pairs."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_spo import cli
from megatron_spo.checkpoint.folder import open_checkpoint
from megatron_spo.config.load import load_config
from megatron_spo.config.yaml_text import parse_yaml
from megatron_spo.planner import presets
from megatron_spo.planner.disk import checkpoint_bytes, gigabytes, most_checkpoints
from tests.support.tiny import arithmetic_pairs, tiny_model, tiny_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, folders with the shapes of large ones, and pairs."""
    desk = tmp_path_factory.mktemp("desk")
    tiny_model(desk / "model", num_hidden_layers=2)
    for name in ("Llama-3.3-70B", "Llama-3.1-8B"):
        shutil.copytree(presets.FOLDER / name, desk / name)
        tiny_tokenizer(desk / name)
    write_jsonl(desk / "pairs.jsonl", arithmetic_pairs(400))
    write_jsonl(desk / "held-out.jsonl", arithmetic_pairs(8, seed=1))
    words = [{"prompt": "x" * 900, "chosen": "y" * 700, "rejected": "z" * (200 + i)} for i in range(40)]
    write_jsonl(desk / "long.jsonl", words)
    return desk


def init(desk: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict[str, Any]]:
    capsys.readouterr()
    code = cli.main(["init", *(str(desk / one) if (desk / one).exists() else one for one in arguments)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out, parse_yaml(printed.out)


def test_training_from_it(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    tiny = ["precision.dtype=fp32", "training.threads=1", "training.steps=30", "logging.report=false"]
    text, values = init(desk, capsys, "model", "pairs.jsonl", f"data.eval={desk}/held-out.jsonl", *tiny)
    (tmp_path / "my.yaml").write_text(text)
    assert "This machine has no GPU" in text
    assert values["output"] == "runs/pairs" and values["reference"]["cache"] == "runs/pairs-reference"
    assert values["checkpoint"]["every"] == 10 and values["training"]["eval_every"] == 7
    for line in text.splitlines():
        if line.startswith(("# Run: megatron-spo", "#      megatron-spo")):
            words = line.replace("# Run:", "").partition("  (")[0].split()
            words = words[words.index("megatron-spo") + 1 :]
            assert cli.main(words) == 0, words
    assert (tmp_path / "my-model/model.safetensors").exists()
    config = load_config("my.yaml")
    shape = presets.shape_of(str(desk / "model"))
    checkpoint = open_checkpoint(tmp_path / "runs/pairs/checkpoints/step_00000030")
    stored = sum(file.stat().st_size for file in checkpoint.path.iterdir())
    assert checkpoint_bytes(config, shape) == pytest.approx(stored, rel=0.2)  # a tiny model's index is not tiny
    assert stored > checkpoint_bytes(config, shape)


def test_the_layout_is_the_planners(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, values = init(desk, capsys, "Llama-3.3-70B", "long.jsonl", "--gpus", "32")
    assert values["parallel"]["tensor"] * values["parallel"]["pipeline"] > 8 and values["parallel"]["sequence"]
    assert "slurm submit my.yaml --nodes 4" in text and "988 GB" in text and "no GPU" not in text
    _, values = init(desk, capsys, "Llama-3.1-8B", "long.jsonl", "lora.rank=8")
    assert "parallel" not in values and values["optimizer"]["lr"] == 1e-4
    text, values = init(desk, capsys, "Llama-3.1-8B", "long.jsonl")
    assert "torchrun --nproc-per-node 2 -m megatron_spo train" in text and values["parallel"]["tensor"] == 2


def test_lengths_and_batch_follow_the_pairs(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, values = init(desk, capsys, "Llama-3.1-8B", "long.jsonl", "--gpus", "8")
    assert values["data"]["max_length"] == 2048 and values["data"]["row_length"] >= 2048
    assert values["training"]["global_batch_size"] == 4
    assert "the longest has 1601." in text and "40 pairs" in text
    given = ["--gpus", "8", "data.row_length=512", "output=out"]
    _, values = init(desk, capsys, "Llama-3.1-8B", "pairs.jsonl", *given)
    assert values["reference"] == {"cache": "out-reference"}
    assert values["data"] == {"train": str(desk / "pairs.jsonl"), "max_length": 128, "row_length": 512}
    assert values["training"]["global_batch_size"] == 8


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["model", "none.jsonl"], "data: file none.jsonl does not exist"),
        (["model", "pairs.jsonl", "loss.name=sigmoid"], "it is dpo here"),
        (["model", "long.jsonl"], "long.jsonl line 1: field "),
        (["Llama-3.3-70B", "pairs.jsonl", "--gpus", "8"], "no layout of this llama model fits on 8 x h100"),
        (["/no/model", "pairs.jsonl"], "MODEL = '/no/model': there is no such folder"),
    ],
)
def test_wrong_input(desk: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str) -> None:
    given = [str(desk / one) if (desk / one).exists() else one for one in arguments]
    assert cli.main(["init", *given]) == 2
    printed = capsys.readouterr()
    assert part in printed.err and printed.out == ""


def test_most_checkpoints(desk: Path) -> None:
    def count(*overrides: str, steps: int) -> int:
        return most_checkpoints(load_config(Path(__file__).parents[2] / "examples/reference.yaml", overrides), steps)

    assert count(steps=100) == 1
    assert count("checkpoint.every=10", steps=100) == 3
    assert count("checkpoint.every=60", steps=100) == 2
    assert count("checkpoint.every=10", "checkpoint.best=loss", "data.eval=a.jsonl", steps=100) == 4


@pytest.mark.parametrize(
    ("size", "text"), [(1.5e6, "1.5 MB"), (8.3e9, "8.3 GB"), (988e9, "988 GB"), (2.5e12, "2.5 TB")]
)
def test_sizes_have_units(size: float, text: str) -> None:
    assert gigabytes(size) == text
