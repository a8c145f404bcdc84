"""The lines of a run that a restart keeps."""

import json
from pathlib import Path

from megatron_spo.train.run_directory import RunDirectory


def test_nothing_is_left_where_all_is_done_again(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text('{"kind": "generation", "step": 0, "data": "test"}\n')
    RunDirectory(tmp_path, is_main=True).open_metrics(after_step=0)
    assert (tmp_path / "metrics.jsonl").read_text() == (tmp_path / "samples.jsonl").read_text() == ""


def test_lines_of_what_is_done_again_are_cut_off(tmp_path: Path) -> None:
    kept = [
        {"kind": "eval", "step": 2, "name": "test"},
        {"kind": "alarm", "step": 2, "data": "test"},
        {"kind": "train", "step": 4},
        {"kind": "alarm", "step": 4, "data": "train"},
        {"kind": "alarm", "step": 4, "reason": "no checkpoint could be written"},
    ]
    owed = [
        {"kind": "eval", "step": 4, "name": "test"},
        {"kind": "alarm", "step": 4, "data": "test", "alarm": "displacement"},
        {"kind": "generation", "step": 4, "data": "test"},
    ]
    later = [{"kind": "train", "step": 5}, {"kind": "alarm", "step": 5, "data": "train"}]
    for sets, left in ((["test"], kept), ([], [*kept, *owed])):
        directory = RunDirectory(tmp_path, is_main=True)
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in [*kept, *owed, *later]))
        (tmp_path / "samples.jsonl").write_text('{"step": 4, "data": "test"}\n')
        directory.open_metrics(after_step=4, pending=sets)
        assert [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == left
        assert bool((tmp_path / "samples.jsonl").read_text()) == (not sets)
