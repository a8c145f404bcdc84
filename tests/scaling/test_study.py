"""Studies: which commands are run, which are not repeated, how failures are reported, and which files are refused."""

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from transformers import AutoModelForCausalLM

from megatron_spo.cli import main
from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.config.yaml_text import format_yaml
from megatron_spo.report.runs import Run
from megatron_spo.scaling.steps import steps_of
from megatron_spo.scaling.study import read_study
from megatron_spo.scaling.table import _cost
from tests.support.processes import ROOT
from tests.support.tiny import FAMILIES, tiny_model


def write_study(folder: Path, name: str, **spec: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(format_yaml({"base": str(folder / "base.yaml"), "out": str(folder / name), **spec}))
    return path


def table(study: Path) -> list[dict[str, str]]:
    with (study.with_suffix("") / "table.csv").open() as file:
        return list(csv.DictReader(file))


def without_times(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


GRID: dict[str, Any] = {"spo.lambda": [0.5, 2.0], "method": {"simpo": {}, "dpop-less": {"loss.beta": 5.0}}}
NOTE = 'import json, sys; json.dump({"size": len(open(sys.argv[1]).read())}, open(sys.argv[2], "w"))'
ENDS = 'import sys; sys.exit(sys.argv[1] == "{}")'
SHARED = 'open(__import__("sys").argv[1], "a").write("once ")'


@pytest.mark.slow
def test_four_runs_killed_in_the_middle_give_the_table_of_four_runs(folder: Path) -> None:
    def spec(name: str) -> dict[str, Any]:
        return {
            "vary": GRID,
            "set": {"training.steps": 30, "checkpoint.every": 5},
            "before": [{"name": "count", "run": f"python -c '{SHARED}' {folder}/{name}.count"}],
            "after": [
                {
                    "name": "note",
                    "run": f"python -c '{NOTE}' {{run}}/config.yaml {{folder}}/note.json",
                    "columns": "{folder}/note.json",
                }
            ],  # fmt: skip
            "crossing": {"metric": "loss", "below": 1e9},
        }

    whole, killed = (write_study(folder, name, **spec(name)) for name in ("whole", "killd"))
    assert main(["scaling", "study", str(whole), "--workers", "2"]) == 0

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "megatron_spo", "scaling", "study", str(killed), "--workers", "2"]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def wait_for(happened: Callable[[], bool]) -> None:
        end = time.monotonic() + 240
        while not happened():
            assert time.monotonic() < end
            time.sleep(0.05)

    process = start()
    wait_for(lambda: (folder / "killd/1/run/metrics.jsonl").exists())
    process.send_signal(signal.SIGKILL)  # its commands continue, and must not be started twice
    process.wait()
    process = start()
    wait_for(lambda: (folder / "killd/3/run/metrics.jsonl").exists())
    process.send_signal(signal.SIGTERM)  # its commands save and end
    assert process.wait() == 130
    assert main(["scaling", "study", str(killed), "--table"]) == 0
    assert {row["state"] for row in table(killed)} & {"stopped", "missing", "unfinished"}
    assert main(["scaling", "study", str(killed), "--workers", "2"]) == 0

    rows = table(killed)
    assert without_times(rows) == without_times(table(whole))
    assert [row["state"] for row in rows] == ["done"] * 4
    assert (folder / "killd.count").read_text() == "once "
    assert [(row["spo.lambda"], row["method"]) for row in rows[:2]] == [("0.5", "simpo"), ("0.5", "dpop-less")]
    assert len({row["eval/loss"] for row in rows}) == 4
    assert {row["crossed"] for row in rows} == {"true"}
    assert {row["steps"] for row in rows} == {"2"}
    assert int(rows[0]["note/size"]) == len((folder / "killd/1/run/config.yaml").read_text())
    lines = [json.loads(line) for line in (folder / "whole/1/run/metrics.jsonl").read_text().splitlines()]
    assert int(rows[0]["D"]) == sum(line["tokens"] for line in lines if line["kind"] == "train")
    assert parquet.read_table(folder / "killd/table.parquet").to_pylist()[1]["method"] == "dpop-less"

    before = {path: path.stat().st_mtime_ns for path in (folder / "whole").rglob("*") if "table" not in path.name}
    assert main(["scaling", "study", str(whole)]) == 0  # all is done: nothing runs
    files = {path: stamp for path, stamp in before.items() if path.is_file()}
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_failed_run_loses_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spec(name: str) -> dict[str, Any]:
        return {
            "vary": {"case": {"good": {}, "infinite": {"optimizer.lr": 1e30}, "no-command": {}, "no-data": {}}},
            "before": [{"name": name, "run": f"python -c '{ENDS.format('no-data')}' {{case}}"}],
            "after": [{"name": "check", "run": f"python -c '{ENDS.format('no-command')}' {{case}}"}],
        }

    assert main(["scaling", "study", str(write_study(folder, "failing", **spec("fine")))]) == 2
    assert "step fine of `before`, or one ahead of it" in capsys.readouterr().err
    study = write_study(folder, "failing", **spec("fine-{case}"))
    with pytest.raises(SystemExit) as ended:
        main(["scaling", "study", str(study)])
    assert ended.value.code == 1
    shown, logged = capsys.readouterr()
    assert "run 1 of 4 (case=good): train; log in " in logged
    assert "run 1 of 4 (case=good): done, " in logged
    assert "run 2 of 4 (case=infinite): train failed: " in logged
    rows = table(study)
    assert [row["state"] for row in rows] == ["done", "failed", "failed", "failed"]
    assert rows[1]["reason"].startswith("train ended with code 3: ")
    assert "not a finite number" in rows[1]["reason"]
    assert rows[2]["reason"].startswith("check ended with code 1: ")
    assert rows[3]["reason"].startswith("fine-no-data ended with code 1: ")
    assert rows[1]["reason"] in shown
    assert rows[3].get("train/loss") == ""
    study.write_text(study.read_text().replace('sys.argv[1] == "no-command"', "False"))
    assert main(["scaling", "study", str(study), "--only", "3"]) == 0
    assert [row["state"] for row in table(study)][2] == "done"


def test_a_family_of_models_has_the_sizes_asked_for(folder: Path) -> None:
    sizes = {"small": {"hidden_size": 16, "intermediate_size": 32}, "deep": {"num_hidden_layers": 3}}
    spec: dict[str, Any] = {
        "models": {"like": str(folder / "model"), "sizes": sizes},
        "set": {"model.path": "{out}/models/{model}"},
    }
    study = write_study(folder, "family", **spec)
    assert main(["scaling", "study", str(study), "--only", "1"]) == 0
    rows = table(study)
    assert [(row["model"], row["state"]) for row in rows] == [("small", "done"), ("deep", "missing")]
    small = AutoModelForCausalLM.from_pretrained(folder / "family/models/small")
    assert int(rows[0]["N"]) == sum(weights.numel() for weights in small.parameters())
    deep = AutoModelForCausalLM.from_pretrained(folder / "family/models/deep")
    assert (deep.config.num_hidden_layers, deep.config.hidden_size) == (3, 32)
    study = write_study(
        folder, "family", **{**spec, "models": {**spec["models"], "sizes": {"small": {"hidden_size": 8}}}}
    )
    assert main(["scaling", "study", str(study), "--table"]) == 0
    assert main(["scaling", "study", str(study)]) == 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_as_transformers_does(tmp_path: Path, family: str, tied: bool) -> None:
    model = tiny_model(tmp_path, family, tie_word_embeddings=tied)
    assert read_model_shape(tmp_path).parameters == sum(weights.numel() for weights in model.parameters())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bad key": (
        {"vary": {"optimizer.lrr": [1, 2], "spo.lambda": [1]}},
        "correct these errors:\ncommand line: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'? (run 1 and ",
    ),
    "bad value": ({"vary": {"loss.name": ["simpo", "simpoo"]}}, "loss.name = 'simpoo'"),
    "impossible": ({"vary": {"loss.name": ["orpo"]}}, "(run 1)"),
    "unknown": ({"vary": {"spo.lambda": [1]}, "setting": {}}, "setting: unknown key"),
    "neither": ({}, "give either `vary` (a grid, with or without `models`) or `runs` (a list)"),
    "no run": ({"vary": {"spo.lambda": [1], "optimizer.lr": []}}, "vary: an entry has no values"),
    "placeholder": ({"vary": {"spo.lambda": [1]}, "set": {"data.train": "{outt}/x"}}, "{outt} is unknown; use one of "),
    "same": ({"runs": [{"spo.lambda": 1}, {"spo.lambda": 1}]}, "runs 1 and 2 are the same; remove one: spo.lambda=1"),
    "name": ({"vary": {"spo.lambda": [1]}, "after": [{"name": "a/b", "run": "true"}]}, "'a/b' is not allowed as the"),
    "words": ({"vary": {"spo.lambda": [1]}, "after": [{"name": "a", "run": "it's"}]}, "cannot be split into words"),
    "twice": (
        {"vary": {"spo.lambda": [1]}, "after": [{"name": "a", "run": "true"}] * 2},
        "two steps of a run have the same name",
    ),
    "base": ({"vary": {"spo.lambda": [1]}, "base": "nowhere.yaml"}, "base: nowhere.yaml does not exist"),
    "size": (
        {"models": {"like": "{folder}/model", "sizes": {"a": {"hidden": 8}}}, "set": {"model.path": "{out}/models/a"}},
        "config.json has no hidden",
    ),
}


def test_steps_without_a_line_are_counted() -> None:
    lines = [{"kind": "train", "step": step, "tokens": 100, "seconds": 0.5} for step in (4, 8, 10)]
    run = Run(lines=lines, config={}, status={}, provenance={}, held_out={}, samples=[])
    assert _cost(run) == {"seconds": 5.0, "training_steps": 10, "D": 1000, "U": 1000}
    run.lines[-1]["epoch"] = 2.5
    assert _cost(run)["U"] == 400


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said_before_a_run_starts(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    spec, said = json.loads(json.dumps(REFUSED[case]).replace("{folder}", str(folder)))
    study = write_study(folder, "refused", **spec)
    assert main(["scaling", "study", str(study)]) == 2
    assert said in capsys.readouterr().err
    assert not (folder / "refused/1").exists()


@pytest.mark.parametrize(
    ("options", "said"), [(["--only", "3"], "--only 3: the study has only"), (["--workers", "0"], "at least 1")]
)
def test_wrong_options(folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    study = write_study(folder, "options", vary={"spo.lambda": [1, 2]})
    assert main(["scaling", "study", str(study), *options]) == 2
    assert said in capsys.readouterr().err


def test_lines_of_a_job_array(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec: dict[str, Any] = {
        "vary": {"loss.name": ["simpo", "dpo"], "data.chat_template": ["it's a file"]},
        "set": {"reference.cache": "{out}/reference"},
        "before": [{"name": "reference", "run": "megatron-spo reference base.yaml"}],
    }
    study = write_study(folder, "array", **spec)
    assert main(["scaling", "study", str(study), "--slurm", "print"]) == 0
    out = folder / "array"
    given = f"SPO_HOME={ROOT} SPO_CONFIG={folder}/base.yaml SPO_OUT={out} SPO_STUDY={out}/lines.txt"
    assert capsys.readouterr().out.strip() == f"env {given} bash {ROOT}/slurm/array_study.sh"
    lines = (out / "lines.txt").read_text()
    words = ["xargs", "-rn1", "printf", "%s\\n"]  # the way the job scripts split a line
    split = subprocess.run(words, input=lines, text=True, capture_output=True, check=True)
    read = read_study(study)
    assert split.stdout.splitlines() == [
        *("loss.name=simpo", "data.chat_template=it's a file"),
        *("loss.name=dpo", "data.chat_template=it's a file"),
    ]
    (read.runs[1].directory).mkdir(parents=True)  # the state after the array's second task
    (read.runs[1].directory / "status.json").write_text('{"state": "done", "step": 4}')
    assert [step.name for step, _ in steps_of(read, read.runs[1])] == ["reference", "train"]
    assert main(["scaling", "study", str(study), "--table"]) == 0
    assert [row["state"] for row in table(study)] == ["missing", "done"]

    spec["before"].append({"name": "sft", "run": "megatron-spo train sft.yaml"})
    assert main(["scaling", "study", str(write_study(folder, "array", **spec)), "--slurm", "print"]) == 2
    assert "step sft of `before` is not done, and the job array does not run it" in capsys.readouterr().err
