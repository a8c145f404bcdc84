import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_spo.errors import UserError
from megatron_spo.report import write_report
from megatron_spo.report.figures import draw_bars


def make_run(folder: Path, *, beta: float, evaluated: bool = True) -> Path:
    """A run directory with 6 steps and, if `evaluated`, two evaluations of one held-out set."""
    folder.mkdir(parents=True)
    lines: list[dict] = []
    for step in range(1, 7):
        numbers = {"loss": 0.7 / step, "rewards/accuracies": 0.5, "spo/gap": 0.01 * step, "spo/lambda": 1.0}
        shifts = {"spo/chosen_shift": -1.5 * step, "spo/rejected_shift": -3.0, "spo/both_down": 0.25}
        lines.append({"kind": "train", "step": step, **numbers, **shifts, "seconds": 0.1})
        if evaluated and step % 3 == 0:
            lines.append({"kind": "eval", "name": "held_out", "step": step, **numbers, "spo/chosen_shift": 7.125})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(f"output: {folder}\nloss:\n  name: dpo\n  beta: {beta}\n")
    (folder / "status.json").write_text('{"state": "done", "step": 6}')
    return folder


class Page(HTMLParser):
    """Collects table cells and every address that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "data")]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("td", "th"):
            self.cells.append(data)


def test_page_is_complete_and_self_contained(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one", beta=0.1), make_run(tmp_path / "two<b>", beta=0.5, evaluated=False)]
    write_report(runs, tmp_path / "deep" / "report.html")
    text = (tmp_path / "deep" / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 7  # every metric, all runs in one picture
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", text)
    assert all(address.startswith("#") for address in page.fetched)
    assert "7.125" in page.cells and "held_out" in page.cells
    assert "loss.beta" in page.cells and "0.5" in page.cells and "loss.name" not in page.cells
    assert "two<b>" not in text
    assert "prefers-color-scheme" in text or "color-scheme: light dark" in text
    assert 'name="viewport"' in text and "currentColor" in text


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", beta=0.1)
    for name in ("a", "b"):
        write_report([run], tmp_path / name)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


def test_an_unfinished_last_line_is_left_out_and_a_damaged_one_named(tmp_path: Path) -> None:
    metrics = make_run(tmp_path / "run", beta=0.1) / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"kind": "train", "ste')
    write_report([tmp_path / "run"], tmp_path / "out")
    metrics.write_text("nonsense\n" + whole)
    with pytest.raises(UserError, match=r"metrics.jsonl line 1: not a metrics line"):
        write_report([tmp_path / "run"], tmp_path / "out")


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        write_report([tmp_path], tmp_path / "out")
    with pytest.raises(UserError, match="at least one"):
        write_report([], tmp_path / "out")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / parent / "run", beta=0.1) for parent in ("a", "b")]
    write_report(runs, tmp_path / "out")
    cells = Page((tmp_path / "out").read_text()).cells
    assert str(runs[0]) in cells and str(runs[1]) in cells


def test_bars_show_their_values() -> None:
    svg = draw_bars({"one": 0.25, "two": 1.0}, {"one": "#123123", "two": "#321321"}, "Shares")
    assert "0.250" in svg and "Shares" in svg and "#123123" in svg
    assert not re.match(r"<svg[^>]* width=", svg)
