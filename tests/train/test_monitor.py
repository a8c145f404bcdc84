"""Alarms of the monitor: raised once per crossing, on screen and in metrics.jsonl; the actions stop and
raise_lambda."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_spo.cli import main
from megatron_spo.config.monitoring import MonitorConfig
from megatron_spo.train import monitor
from megatron_spo.train.monitor import TRAIN, MonitorState, check, check_answers
from tests.support.tiny import arithmetic_pairs, tiny_run, write_jsonl

BOUNDS = MonitorConfig(chosen_fall=0.1, both_down=0.5)


def line(shift: float, *, both_down: float = 0.0, entropy: float = 1.0, **more: float) -> dict[str, float]:
    """Returns a line of metrics of 4 pairs whose chosen answers have 10 tokens each."""
    return {"spo/chosen_shift": shift, "spo/both_down": both_down, "spo/gap": -shift / 10, "policy/entropy": entropy,
            "rewards/margins": 0.1, "pairs": 4, "chosen_tokens": 40, **more}  # fmt: skip


def raised(lines: list[dict[str, float]], data: str = "held-out") -> list[list[str]]:
    """Returns the alarms of each line in turn; the state is converted to JSON and back in between, as in a
    checkpoint."""
    state, found = MonitorState(), []
    for step, metrics in enumerate(lines, 1):
        state, alarms = check(BOUNDS, state, step, data, metrics)
        state = MonitorState.from_dict(json.loads(json.dumps(asdict(state))))
        found.append([alarm["alarm"] for alarm in alarms])
    return found


def test_once_per_crossing_and_again_after_half_the_bound() -> None:
    shifts = [0.0, -0.9, -1.1, -2.0, -0.9, -1.1, -0.6, -1.1, -0.4, -1.1]
    assert raised([line(shift) for shift in shifts]) == [
        [], [], ["displacement"], [], [], [], [], [], [], ["displacement"],
    ]  # fmt: skip


def test_value_and_bound_are_in_the_metric_s_unit_and_the_message_is_readable() -> None:
    _, alarms = check(BOUNDS, MonitorState(), 140, "held-out", line(-3.1, both_down=0.4))
    assert alarms == [
        {
            "data": "held-out", "alarm": "displacement", "metric": "spo/chosen_shift", "value": -3.1, "bound": -1.0,
            "message": "step 140, held-out: the preferred answers lost 3.1 nats, both fell in 40% of pairs: the model "
            "is leaving the safe region; see docs/monitoring.md",
        }
    ]  # fmt: skip


def test_training_batches_are_averaged() -> None:
    calm, odd = line(0.2), line(-1.9)
    assert raised([calm] * 5 + [odd] + [calm] * 5, TRAIN) == [[]] * 11
    assert raised([calm] * 5 + [odd], "held-out")[-1] == ["displacement"]
    fall = raised([calm] * 5 + [odd] * 9, TRAIN)
    assert sum(fall, []) == ["displacement"]
    mean = 0.0
    for step in range(1, 15):
        mean = 0.8 * mean + 0.2 * (0.2 if step <= 5 else -1.9)
        if mean / (1 - 0.8**step) < -1:
            break
    assert fall[step - 1] == ["displacement"]


def test_both_down_counts_once_the_chosen_answers_have_lost_something() -> None:
    assert raised([line(-0.1, both_down=0.9), line(-0.2, both_down=0.9)]) == [[], ["both_down"]]


def test_both_down_counts_from_where_the_chosen_answers_stood_best() -> None:
    """The alarm is raised once per fall: changing shares do not arm it again, a recovery of the chosen answers does."""
    course = [(0.5, 0.9), (0.45, 0.9), (0.3, 0.9), (0.2, 0.0), (0.2, 0.9), (0.48, 0.0), (0.3, 0.9)]
    assert raised([line(shift, both_down=share) for shift, share in course]) == [
        [], [], ["both_down"], [], [], [], ["both_down"],
    ]  # fmt: skip


def test_the_gap_where_no_shift_is_measured_or_the_sft_rows_are_others() -> None:
    without = {key: value for key, value in line(-2.0).items() if key not in ("spo/chosen_shift", "spo/both_down")}
    assert raised([without]) == [["gap"]]
    assert raised([line(0.5, **{"spo/gap": 0.2, "sft_rows": 3})]) == [["gap"]]
    assert raised([line(0.5, **{"spo/gap": 0.2})]) == [[]]


def test_entropy_either_way_but_not_under_sft() -> None:
    assert raised([line(0, entropy=e) for e in (1.0, 2.9, 3.1, 2.0, 1.6, 0.4, 0.3)]) == [
        [], [], ["entropy"], [], [], [], ["entropy"],
    ]  # fmt: skip
    sft = [{**line(0, entropy=e)} for e in (1.0, 0.1)]
    for one in sft:
        del one["rewards/margins"]
    assert raised(sft) == [[], []]
    assert raised([line(0, entropy=e) for e in (0.0, 0.0, 1.0)]) == [[], [], ["entropy"]]
    assert raised([line(0, entropy=e) for e in (1.0, 0.0)]) == [[], ["entropy"]]


def test_right_answers_that_are_lost() -> None:
    state, found = MonitorState(), []
    for step, share in enumerate((0.9, 0.86, 0.84, 0.5, 0.89, 0.8)):
        state, alarms = check_answers(state, step, "held-out", share)
        found += alarms
    assert [alarm["message"].split(":")[0] for alarm in found] == ["step 2, held-out", "step 5, held-out"]
    assert found[0]["alarm"] == "answers" and found[0]["value"] == 0.84 and found[0]["bound"] == pytest.approx(0.85)
    assert "right answers went from 90% to 84% of the prompts" in found[0]["message"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose held-out chosen answers fall: large steps on few pairs, with alarms at the smallest fall."""
    config = tiny_run(
        tmp_path,
        pairs=24,
        held_out=7,
        loss={"name": "dpo", "beta": 0.5},
        spo={"schedule": "penalty", "lambda": 0.001},
        optimizer={"lr": 3e-3},
        training={"steps": 8, "eval_every": 2},
        monitor={"chosen_fall": 0.001},
    )
    assert main(["reference", str(config)]) == 0
    return tmp_path


def train(folder: Path, *overrides: str) -> int:
    return main(["train", str(folder / "config.yaml"), *overrides])


def read(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [one for one in lines if one["kind"] == kind]


def test_warn_says_it_and_leaves_the_numbers_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(folder, "logging.every=3") == 0
    said, alarms = capsys.readouterr().err, read(folder / "run", "alarm")
    assert {"displacement"} <= {alarm["alarm"] for alarm in alarms}
    assert all(f"warning: {alarm['message']}\n" in said for alarm in alarms)
    assert train(folder, f"output={folder}/quiet", "monitor.chosen_fall=1e6", "monitor.both_down=1") == 0
    loud, quiet = read(folder / "run", "eval"), read(folder / "quiet", "eval")
    assert [{**one, "seconds": 0} for one in loud] == [{**one, "seconds": 0} for one in quiet]
    assert not read(folder / "quiet", "alarm")


def test_stop_saves_ends_with_3_and_goes_on_past_the_alarm(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(folder, f"output={folder}/whole") == 0
    assert train(folder, "monitor.on_alarm=stop") == 3
    status = json.loads((folder / "run/status.json").read_text())
    first = read(folder / "run", "alarm")[0]
    assert (status["state"], status["code"], status["step"]) == ("failed", 3, first["step"])
    assert first["message"] in status["reason"] and first["message"] in capsys.readouterr().err
    assert status["checkpoint"] == f"step_{first['step']:08d}"
    codes = [train(folder, "monitor.on_alarm=stop") for _ in range(8)]
    assert codes[-1] == 0 and set(codes) <= {0, 3}
    assert [one["loss"] for one in read(folder / "run", "train")] == [
        one["loss"] for one in read(folder / "whole", "train")
    ]


@pytest.mark.parametrize("schedule", ["penalty", "lookahead", "dual"])
def test_raise_lambda_from_the_next_step_on_and_through_a_restart(folder: Path, schedule: str) -> None:
    given = ["monitor.on_alarm=raise_lambda", f"spo.schedule={schedule}"]
    if schedule == "dual":
        given += ["spo.dual_lr=1e-9", "spo.lambda_max=0.005"]
    assert train(folder, *given) == 0
    raising = sorted({(one["step"], one["data"]) for one in read(folder / "run", "alarm")})
    assert raising and "multiplied by 2" in read(folder / "run", "alarm")[0]["message"]
    for one in read(folder / "run", "train"):
        expected = 0.001 * 2 ** sum(step < one["step"] for step, _ in raising)
        expected = min(expected, 0.005) if schedule == "dual" else expected
        assert one["spo/lambda"] == pytest.approx(expected, rel=1e-5)
    half = [*given, f"output={folder}/half"]
    assert train(folder, *half, "training.steps=5") == 0
    assert train(folder, *half) == 0
    whole, resumed = ({one["step"]: one for one in read(folder / name, "train")} for name in ("run", "half"))
    assert all(resumed[step]["spo/lambda"] == whole[step]["spo/lambda"] for step in whole)
    assert resumed[8]["loss"] == whole[8]["loss"]


def test_a_lambda_at_its_bound_is_not_said_to_be_raised(folder: Path) -> None:
    given = ["spo.schedule=dual", "spo.dual_lr=1e-30", "spo.lambda_max=0.001", "training.steps=4"]
    assert train(folder, *given, "monitor.on_alarm=raise_lambda") == 0
    alarms = read(folder / "run", "alarm")
    assert alarms and all("lambda stays at 0.001" in alarm["message"] for alarm in alarms)


def test_bounds_and_evaluations_are_part_of_the_trajectory_where_they_raise_lambda(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, "training.steps=2", "monitor.on_alarm=raise_lambda") == 0
    assert train(folder, "monitor.on_alarm=raise_lambda", "monitor.chosen_fall=0.5") == 2
    assert "monitor.chosen_fall: 0.001 -> 0.5" in capsys.readouterr().err
    others = ["training.eval_every=4", f"data.eval={folder}/pairs.jsonl"]
    assert train(folder, "monitor.on_alarm=raise_lambda", *others) == 2
    assert "training.eval_every: 2 -> 4" in (said := capsys.readouterr().err) and "data.eval: " in said


def test_answers_that_change_raise_lambda(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's answers before training count as correct here, so that training loses them."""
    rows = arithmetic_pairs(7, seed=1)
    room = 2 * max(len(row["chosen"]) + 1 for row in rows)
    prompts = write_jsonl(folder / "prompts.jsonl", rows)
    given = ["--prompts", str(prompts), "--out", str(folder / "out.jsonl"), "--max-new-tokens", str(room)]
    assert main(["generate", str(folder / "model"), *given]) == 0
    answers = [json.loads(text)["responses"][0] for text in (folder / "out.jsonl").read_text().splitlines()]
    named = [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]
    write_jsonl(folder / "held-out.jsonl", named)
    monkeypatch.setattr(monitor, "ENTROPY_FACTOR", 1e6)
    quiet = ["monitor.chosen_fall=1e6", "monitor.both_down=1"]
    assert train(folder, *quiet, "monitor.generate_every=2", "monitor.on_alarm=raise_lambda") == 0
    found = [one["generation/exact_match"] for one in read(folder / "run", "generation")]
    assert found[0] == 1 and min(found) < 0.95
    (alarm,) = [one for one in read(folder / "run", "alarm") if one["alarm"] == "answers"][:1]
    assert alarm["step"] == 2 * next(i for i, share in enumerate(found) if share < 0.95)
    raised = [one["spo/lambda"] for one in read(folder / "run", "train")]
    assert raised[alarm["step"] - 1] == 0.001 and raised[alarm["step"]] == 0.002
    samples = [json.loads(text) for text in (folder / "run/samples.jsonl").read_text().splitlines()]
    assert [one["answer"] for one in samples[:7]] == answers


def test_held_out_pairs_add_up_to_the_evaluation(folder: Path) -> None:
    assert train(folder) == 0
    found = json.loads((folder / "run/held_out/held-out.json").read_text())
    last = read(folder / "run", "eval")[-1]
    rows = [json.loads(text) for text in (folder / "held-out.jsonl").read_text().splitlines()]
    assert found["step"] == last["step"] == 8
    assert [pair["row"] for pair in found["pairs"]] == list(range(1, 8))
    for side in ("chosen", "rejected"):
        mean = sum(pair[f"{side}_shift"] for pair in found["pairs"]) / 7
        assert mean == pytest.approx(last[f"spo/{side}_shift"], abs=1e-6)
        assert [pair[f"{side}_tokens"] for pair in found["pairs"]] == [len(row[side]) + 1 for row in rows]
    falls = [pair["chosen_shift"] for pair in found["worst"]]
    assert falls and falls == sorted(falls) and falls[0] == min(pair["chosen_shift"] for pair in found["pairs"])
    for worst in found["worst"]:
        row = rows[worst["row"] - 1]
        assert worst["prompt"] == row["prompt"] and worst["chosen"] == row["chosen"] + "<eos>"
