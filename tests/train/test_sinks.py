"""W&B (offline) and TensorBoard: their files, read with their own readers."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_spo.cli import main
from megatron_spo.errors import Anomaly, Stopped
from megatron_spo.runtime.logs import log_to_stderr
from megatron_spo.train.sinks import Sinks, WeightsAndBiases, named
from tests.support.tiny import arithmetic_pairs, tiny_model, tiny_run, write_jsonl


def test_a_sink_that_fails_is_left_out_with_one_warning(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    class Broken:
        def line(self, kind: str, step: int, values: object) -> None:
            raise OSError("no network")

        def table(self, name: str, step: int, rows: object) -> None: ...

        def close(self, report: Path, code: int) -> None: ...

    class Kept(Broken):
        seen: list[int] = []

        def line(self, kind: str, step: int, values: object) -> None:
            self.seen.append(step)

    class Unopened(Broken):
        def __init__(self) -> None:
            raise ValueError("no account")

    log_to_stderr()
    sinks = Sinks()
    for kind in (Broken, Kept, Unopened):
        sinks.open(kind)
    for step in (1, 2):
        sinks.line("train", step, {"loss": 1.0})
    said = capsys.readouterr().err
    assert said.count("warning: Broken failed") == 1 and "no network" in said
    assert said.count("warning: Unopened failed") == 1
    assert Kept.seen == [1, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in two parts; the second part repeats steps 3 and 4."""
    os.environ.pop("WANDB_PROJECT", None)
    folder = tmp_path_factory.mktemp("sinks")
    config = tiny_run(
        folder,
        pairs=24,
        held_out=[{**row, "answer": row["chosen"]} for row in arithmetic_pairs(5, seed=1)],
        loss={"name": "dpo", "beta": 0.5},
        spo={"schedule": "penalty", "lambda": 0.001},
        optimizer={"lr": 3e-3},
        training={"eval_every": 2},
        monitor={"chosen_fall": 1e-3, "generate_every": 4, "generate_prompts": 3},
        checkpoint={"every": 2, "keep": 9},
        logging={"wandb": "offline", "tensorboard": True, "report": True},
    )
    assert main(["reference", str(config)]) == 0
    assert main(["train", str(config)]) == 0
    (folder / "run/checkpoints/latest").write_text("step_00000002")
    assert main(["train", str(config), "training.steps=6"]) == 0
    return folder


def lines(folder: Path, kind: str) -> list[dict]:
    read = [json.loads(text) for text in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [line for line in read if line["kind"] == kind]


def wandb_records(file: Path) -> Iterator[Any]:
    """Yields W&B's messages in a .wandb file, which is a LevelDB log."""
    from wandb.proto import wandb_internal_pb2

    content, at, part = file.read_bytes(), 7, b""  # after the file's own header
    while at < len(content):
        if 32768 - at % 32768 < 7:  # the rest of the block is too short for a header
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        part, at = part + content[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a complete record, or its last part
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # made when it is imported
            record.ParseFromString(part)
            part = b""
            yield record


def wandb_history(file: Path) -> tuple[str, list[dict], list[str]]:
    """Returns run id, logged rows and artefact names of a .wandb file."""
    rows, artefacts, run_id = [], [], ""
    for record in wandb_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
        if kind == "artifact":
            artefacts.append(record.artifact.name)
        if kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            artefacts.append(record.request.log_artifact.artifact.name)
        if kind == "history":
            items = record.history.item
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return run_id, rows, artefacts


def wandb_project(file: Path) -> str:
    (project,) = {r.run.project for r in wandb_records(file) if r.WhichOneof("record_type") == "run"}
    return str(project)


def wandb_end(file: Path) -> tuple[int | None, bool]:
    """Returns the exit code in a .wandb file, which W&B's own process may write a little later, and whether the run was
    marked as to be resumed."""
    for _ in range(100):
        records = {record.WhichOneof("record_type"): record for record in wandb_records(file)}
        if "exit" in records:
            return records["exit"].exit.exit_code, "preempting" in records
        time.sleep(0.2)
    return None, False


@pytest.mark.parametrize("code", [0, Stopped.code, Anomaly.code])
def test_wandb_is_told_how_a_run_ended(tmp_path: Path, code: int) -> None:
    sinks = Sinks()
    sinks.open(WeightsAndBiases, tmp_path, mode="offline", project="test", config={}, sets=[])
    sinks.line("train", 1, {"loss": 1.0})
    sinks.close(tmp_path / "report.html", code)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert wandb_end(file) == (code, code == Stopped.code)


def test_wandb_is_told_of_a_run_that_an_alarm_ends(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the environment names the project."""
    monkeypatch.setenv("WANDB_PROJECT", "another")
    out = [f"output={tmp_path}/run", "monitor.on_alarm=stop"]
    assert main(["train", str(folder / "config.yaml"), *out]) == Anomaly.code
    (file,) = tmp_path.glob("run/wandb/offline-run-*/run-*.wandb")
    assert wandb_end(file) == (Anomaly.code, False)
    assert wandb_project(file) == "another"


def test_wandb_holds_every_line_under_one_id(folder: Path) -> None:
    files = sorted((folder / "run/wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    first, second = (wandb_history(file) for file in files)
    assert [wandb_project(file) for file in files] == ["megatron-spo"] * 2
    assert first[0] == second[0] == (folder / "run/wandb_id").read_text()
    losses = {row["train/global_step"]: row["train/loss"] for row in [*first[1], *second[1]] if "train/loss" in row}
    assert losses == {line["step"]: line["loss"] for line in lines(folder, "train")}
    logged = {key for row in second[1] for key in row}
    assert {"eval/spo/chosen_shift", "eval/rewards/margins", "generation/exact_match"} <= logged
    assert any(key.startswith("worst pairs/held-out") for key in logged)
    assert any(key.startswith("samples/held-out") for key in logged)
    alarms = {key for row in first[1] for key in row if key.startswith("alarm/")}
    assert alarms == {f"alarm/{one['data']}/{one['alarm']}" for one in lines(folder, "alarm") if one["step"] <= 4}
    assert any(name == f"report-{first[0]}" for name in second[2])


def test_names_are_those_of_trl() -> None:
    """With one held-out set as with one `eval_dataset`, with several as with a dict of them."""
    line = {"name": "eval", "loss": 0.5, "rewards/chosen": 1.0, "policy/entropy": 2.0, "seconds": 3.0}
    assert named("train", {"loss": 0.5, "grad_norm": 1.0}, ["eval"]) == {"train/loss": 0.5, "train/grad_norm": 1.0}
    assert named("eval", line, ["eval"]) == {
        "eval/loss": 0.5, "eval/rewards/chosen": 1.0, "eval/entropy": 2.0, "eval/runtime": 3.0
    }  # fmt: skip
    assert {"eval/math_loss", "eval/math_rewards/chosen"} < {*named("eval", {**line, "name": "math"}, ["math", "chat"])}
    assert named("generation", {"data": "a", "generation/rep_4": 0.1}, ["a"]) == {"generation/rep_4": 0.1}


def test_tensorboard_holds_every_line_once(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run/tensorboard"), purge_orphaned_data=True).Reload()
    for metric, name in {"loss": "loss", "spo/chosen_shift": "spo/chosen_shift", "policy/entropy": "entropy"}.items():
        found = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert found == pytest.approx({line["step"]: line[metric] for line in lines(folder, "train")}, rel=1e-6)
        assert len(events.Scalars(f"train/{name}")) == 6
    assert {event.step for event in events.Scalars("generation/malformed")} == {0, 4, 6}
    tags = events.Tags()["tensors"]
    assert any(tag.startswith("alarm/train") for tag in tags)
    assert any(tag.startswith("worst pairs/held-out") for tag in tags)


@pytest.mark.parametrize("kind", ["whole", "lora", "experts"])
def test_answers_are_those_of_the_exported_model(folder: Path, kind: str) -> None:
    """Compares the last answers with `convert` and `generate` of the same weights."""
    from megatron_spo.evaluate.scores import score

    run = folder if kind == "whole" else _trained_otherwise(folder, kind)
    samples = [json.loads(text) for text in (run / "run/samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0] * 3 + [4] * 3 + [6] * 3 * (kind == "whole")
    assert main(["convert", str(run / "run"), str(run / "hf"), "--to", "hf"]) == 0
    rows = [json.loads(text) for text in (folder / "held-out.jsonl").read_text().splitlines()][:3]
    longest = max(len(row["chosen"]) for row in rows) + 1
    write_jsonl(run / "prompts.jsonl", rows)
    given = ["--prompts", str(run / "prompts.jsonl"), "--out", str(run / "out.jsonl")]
    assert main(["generate", str(run / "hf"), *given, "--max-new-tokens", str(2 * longest)]) == 0
    answers = [json.loads(text) for text in (run / "out.jsonl").read_text().splitlines()]
    assert [sample["answer"] for sample in samples[-3:]] == [row["responses"][0] for row in answers]
    assert [sample["answer"] for sample in samples[-3:]] != [sample["answer"] for sample in samples[:3]]
    assert [sample["reference"] for sample in samples[-3:]] == [row["chosen"] for row in rows]
    scores = score(rows, [row["responses"] for row in answers], [row["finished"] for row in answers])
    line = lines(run, "generation")[-1]
    for name in ("exact_match", "malformed", "rep_4", "distinct_2", "length_ratio"):
        assert line[f"generation/{name}"] == pytest.approx(getattr(scores, name))
    assert not (run / "run/.answers").exists()


def _trained_otherwise(folder: Path, kind: str) -> Path:
    """Trains four steps with adapters, or a mixture of experts with trainable routers."""
    there = folder / kind
    there.mkdir()
    overrides = [f"output={there}/run", "logging.wandb=off", "optimizer.lr=1e-2"]
    if kind == "lora":
        overrides += ["lora.rank=4"]
    else:
        tiny_model(there / "model", "mixtral")
        overrides += [f"model.path={there}/model", "model.router_aux_loss=0", f"reference.cache={there}/cache"]
        assert main(["reference", str(folder / "config.yaml"), *overrides]) == 0
    assert main(["train", str(folder / "config.yaml"), *overrides]) == 0
    return there
