"""The command line: help, exit codes and messages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_spo import cli
from megatron_spo.config.schema import Config
from megatron_spo.errors import UserError
from tests.support.processes import PYTHONPATH

ROOT = Path(__file__).parents[2]
COMMANDS = ("train", "reference", "convert", "generate", "pairs", "rounds", "evaluate", "plan", "report", "doctor")


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "megatron_spo", *arguments], capture_output=True, text=True)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: a/model}\ndata: {train: a.jsonl}\nreference: {cache: b}\noutput: c\n")
    return path


def test_help_lists_the_commands() -> None:
    result = call("--help")
    assert result.returncode == 0
    assert all(f"\n    {command}" in result.stdout for command in COMMANDS)


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("doctor", 141)])  # argparse hides the error
def test_a_reader_that_ends_first_is_no_error(argument: str, code: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "megatron_spo", argument]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (code, "")


def test_help_and_doctor_import_nothing_heavy() -> None:
    """Returns the help of every command, and the output of `doctor` without an NVIDIA driver, from one process."""
    code = """
import shutil, sys
from megatron_spo.cli import main
for command in sys.argv[1:]:
    try:
        main([*command.split(), "--help"])
    except SystemExit as stop:
        assert stop.code == 0, command
if shutil.which("nvidia-smi") is None:
    main(["doctor"])
heavy = {"torch", "megatron.core", "numpy", "scipy", "pyarrow", "transformers", "datasets", "matplotlib", "wandb"}
print(heavy & set(sys.modules), file=sys.stderr)
"""
    arguments = [*COMMANDS, "scaling fit", "scaling study"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr.strip() == "set()", result.stderr
    assert all(f"usage: megatron-spo {command} " in result.stdout for command in arguments)


@pytest.mark.parametrize(
    ("given", "parts", "absent"),
    [
        (["train", "--help"], ["optimizer  ", "--help SECTION"], "optimizer.lr"),
        (["train", "--help", "optimizer"], ["optimizer.lr  [1.0e-06]", "peak learning rate"], "spo.lambda"),
        (["plan", "--help", "spo"], ["spo.lambda  [1.0]", "nats per", "alternating "], "optimizer.lr"),
        (["reference", "-h", "loss"], ["loss.beta", "alpha_dpo"], "spo.lambda"),
        (["train", "--help", "all"], ["optimizer.lr", "spo.lambda", "output  [required]", "alpha_dpo"], "usage"),
        (["train", "--help", "data.row_length"], ["maximum tokens of a packed row"], "data.max_length  ["),
    ],
)
def test_help_shows_the_keys_of_a_section(
    given: list[str], parts: list[str], absent: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(given)
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(part in text for part in parts) and absent not in text


def test_help_of_an_unknown_section_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help", "optimizr"])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "optimizr: not a section or a key" in text and "\n  optimizer " in text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "missing.yaml"], "missing.yaml: configuration file does not exist"),
        (["reference", "missing.yaml"], "missing.yaml: configuration file does not exist"),
    ],
)
def test_wrong_input_is_one_message(arguments: list[str], part: str) -> None:
    result = call(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and part in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["convert", "a", "b"], ["generate", "a"], ["report"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "error: " in said
    assert "section.key=value" not in said.partition("error: ")[2]  # it is optional


def test_the_configuration_is_checked_before_torch_is_loaded(run_file: Path) -> None:
    code = (
        "import sys; from megatron_spo.cli import main\n"
        f"code = main(['train', {str(run_file)!r}, 'spo.schedule=none', 'spo.lambda=2'])\n"
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "spo.lambda has no effect with spo.schedule: none" in result.stderr


def test_world_size_comes_from_the_launcher(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["train", str(run_file), "parallel.tensor=2"]) == 2
    assert "3 processes are not a multiple of" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")  # only rank 0 prints the message
    assert cli.main(["train", str(run_file), "parallel.tensor=2"]) == 2
    assert capsys.readouterr().err == ""


def test_train_gets_the_configuration(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    monkeypatch.setattr("megatron_spo.train.run.train", seen.append)
    monkeypatch.chdir(run_file.parent)
    Path("a.jsonl").touch()
    assert cli.main(["train", str(run_file), "training.seed=5"]) == 0
    assert seen[0].training.seed == 5


def test_overrides_may_follow_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    options = cli._parse(
        ["plan", "a.yaml", "loss.beta=1", "--gpus", "8", "training.seed=5", "--top", "3", "spo.lambda=2"]
    )
    assert options.overrides == ["loss.beta=1", "training.seed=5", "spo.lambda=2"]
    for words in (["plan", "a.yaml", "--gpus", "8", "b.yaml"], ["doctor", "a=1"], ["train", "a.yaml", "--lr=1"]):
        with pytest.raises(SystemExit) as stop:
            cli._parse(words)
        assert stop.value.code == 2 and f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(UserError("no"), 2), (KeyboardInterrupt(), 130)])
def test_exit_codes(run_file: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def fail(config: Config) -> None:
        raise error

    monkeypatch.setattr("megatron_spo.reference.fill.fill", fail)
    assert cli.main(["reference", str(run_file)]) == code


def test_file_commands_pass_their_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def record(*arguments: object, **options: object) -> list[str]:
        calls.append((arguments, options))
        return ["done"]

    monkeypatch.setattr("megatron_spo.convert.export.convert", record)
    monkeypatch.setattr("megatron_spo.evaluate.generate.generate_file", record)
    monkeypatch.setattr("megatron_spo.report.write_report", record)
    assert cli.main(["convert", "run", "out", "--to", "hf", "--verify", "--workers", "2"]) == 0
    options = ["--samples", "4", "--temperature", "0.7", "--seed", "3", "--engine", "vllm"]
    assert cli.main(["generate", "model", "--prompts", "p.jsonl", "--out", "o.jsonl", *options]) == 0
    assert cli.main(["report", "a", "b", "--out", "r.html"]) == 0
    sampling = {"samples": 4, "temperature": 0.7, "max_new_tokens": None, "batch_size": 64, "seed": 3, "engine": "vllm"}
    assert calls == [
        ((Path("run"), Path("out"), "hf"), {"verify": True, "workers": 2}),
        ((Path("model"), Path("p.jsonl"), Path("o.jsonl")), sampling),
        (([Path("a"), Path("b")], Path("r.html")), {}),
    ]


@pytest.mark.parametrize("tool", ["precompute_reference", "convert_checkpoint"])
def test_tools(tool: str) -> None:
    command = [sys.executable, str(ROOT / f"tools/{tool}.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PYTHONPATH})
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
