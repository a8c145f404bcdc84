import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_spo.errors import UserError
from megatron_spo.report import write_report
from megatron_spo.report.figures import ALARM, MAX_POINTS, PALETTE, SIDES, Curve, draw_bars, draw_curves, thinned
from megatron_spo.report.page import DARK, LIGHT
from megatron_spo.report.results import group_runs, summary
from megatron_spo.report.runs import read_runs
from tests.report.full_run import make_full_run, write
from tests.support.processes import cli, run_jobs
from tests.support.tiny import tiny_run

SECTIONS = (
    "Results", "Alarms", "Curves", "Generated answers", "Held-out pairs", "Pairs whose chosen answer fell most",
    "Samples", "Speed", "What differs between the runs", "Provenance",
)  # fmt: skip


def make_run(folder: Path, *, beta: float, evaluated: bool = True) -> Path:
    """Writes a run directory with 6 steps and, if `evaluated`, two evaluations of one held-out set."""
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
    """Collects table cells and every URL that a browser would fetch."""

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
    assert page.tags.count("svg") == 7  # one plot per metric
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
    assert "a" in cells and "b" in cells


def test_runs_of_a_study_are_named_by_what_differs_and_in_natural_order(tmp_path: Path) -> None:
    for i, beta in enumerate((10, 2, 0.5) * 6, 1):
        run = make_run(tmp_path / f"{i}/run", beta=beta)
        (run / "config.yaml").write_text(
            f"output: {run}\nloss: {{name: dpo, beta: {beta}}}\noptimizer: {{lr: {i}e-7}}\n"
        )
    write_report([tmp_path / f"{i}/run" for i in range(1, 19)], tmp_path / "out")
    text = (tmp_path / "out").read_text()
    assert "<h1>SPO: 18 runs</h1>" in text
    runs = list(read_runs([tmp_path / f"{i}/run" for i in range(1, 19)]))
    assert runs[:3] == ["beta 0.5, lr 3e-7", "beta 0.5, lr 6e-7", "beta 0.5, lr 9e-7"]
    assert runs[-1] == "beta 10, lr 1.6e-6" and len(set(runs)) == 18
    assert "differs: loss.beta, optimizer.lr" in text and "(dashed)" in text
    assert list(read_runs([make_run(tmp_path / f"run{i}", beta=0.1) for i in (10, 9)])) == ["run9", "run10"]


def first_line(runs: list[Path], out: Path) -> str:
    write_report(runs, out)
    found = re.search(r"</h1>\s*<p class=\"verdict (good|bad)\"><strong>(.*?)</strong>", out.read_text())
    assert found
    return f"{found[1]}: {found[2]}"


def test_the_first_line_says_whether_the_runs_are_healthy(tmp_path: Path) -> None:
    good, bad = make_full_run(tmp_path / "good", falls=False), make_full_run(tmp_path / "bad")
    out = tmp_path / "out.html"
    healthy = r"good: Healthy: all 60 steps are done, no alarm. On held_out: log p\(chosen\) \+\S+ nats, accuracy 0.90"
    assert re.match(healthy, first_line([good], out))
    assert first_line([bad], out).startswith("bad: Not healthy: alarm at step 30: the preferred answers lost 3.1 nats")
    text = first_line([good, bad], out)
    assert text == "bad: 1 of 2 runs are healthy. With alarms or failed: bad."
    (good / "status.json").write_text('{"state": "failed", "step": 60, "steps": 90, "reason": "disk full"}')
    assert first_line([good], out) == "bad: Failed after step 60 of 90: disk full"
    (good / "status.json").write_text('{"state": "running", "step": 60, "steps": 90}')
    assert first_line([good], out).startswith("good: Healthy so far: step 60 of 90, no alarm.")


def test_the_page_names_what_was_trained(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, pairs=8, loss={"name": "simpo"}, reference=None, logging={"report": True})
    run_jobs([("train", str(config), [])], 1)
    text = (tmp_path / "run/report.html").read_text()
    for fact in (
        "model model",
        "loss simpo",
        "SPO penalty, lambda 1",
        "data pairs.jsonl",
        "lr 0.001",
        "8 pairs per step",
    ):
        assert fact in text, fact


def test_steps_are_whole_numbers() -> None:
    svg = draw_curves([Curve("run", PALETTE[0], [(1, 0.5), (2, 0.6)])], "Loss")
    steps = svg.partition('id="matplotlib.axis_1"')[2].partition('id="matplotlib.axis_2"')[0]
    assert re.findall(r"<text[^>]*>([^<]*)</text>", steps) == ["1", "2", "step"]


def test_groups_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run{i}", beta=beta) for i, beta in enumerate((0.1, 0.1, 0.5, 0.5))]
    write_report(runs, tmp_path / "out")
    text = (tmp_path / "out").read_text()
    assert {"run (2 seeds)", "run2 (2 seeds)"} <= set(Page(text).cells)
    assert all(f"</i>{name} (2 seeds)</span>" in text for name in ("run", "run2"))


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", beta=0.1)
    with pytest.raises(UserError, match=r"metrics.jsonl/report.html cannot be written"):
        write_report([run], run / "metrics.jsonl" / "report.html")


def test_bars_show_their_values() -> None:
    svg = draw_bars({"one": 0.25, "two": 1.0}, {"one": "#123123", "two": "#321321"}, "Shares")
    assert "0.250" in svg and "Shares" in svg and "#123123" in svg
    assert not re.match(r"<svg[^>]* width=", svg)


def headings(text: str) -> list[str]:
    return re.findall(r"<h2 id=[^>]*>(.*?)</h2>", text)


def test_every_part_of_a_run_is_shown(tmp_path: Path) -> None:
    runs = [make_full_run(tmp_path / f"simpo-seed{seed}", seed=seed) for seed in range(3)]
    runs.append(make_full_run(tmp_path / "dpo", loss="dpo", falls=False))
    write_report(runs, tmp_path / "out.html")
    text = (tmp_path / "out.html").read_text()
    page = Page(text)
    assert headings(text) == list(SECTIONS)
    assert [address for address in page.fetched if not address.startswith("#")] == []
    assert "script" not in page.tags and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert page.tags.count("svg") == 8 + 5 + 4 + 1  # metrics, scores of answers, distributions, speed
    seeds = ["simpo (3 seeds)", "held_out", "60"]
    assert any(page.cells[i : i + 3] == seeds for i in range(len(page.cells)))
    assert "3.1 nats" in text and "60%" in page.cells and "tokens/s" in page.cells
    assert "training.seed" in page.cells and "loss.name" in page.cells
    assert "torch: &quot;2.13.0&quot;" in text and "fedcba98" in text
    assert "step 60: wrong, malformed" in text and "step 10: right" in text
    assert "It is 42. It is 42." in text


def test_missing_parts_leave_no_section(tmp_path: Path) -> None:
    write_report([make_run(tmp_path / "one", beta=0.1)], tmp_path / "out")
    assert headings((tmp_path / "out").read_text()) == ["Results", "Curves", "Speed", "Provenance"]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    write_report([empty], tmp_path / "out")
    assert headings((tmp_path / "out").read_text()) == ["Results", "Provenance"]


def test_alarms_are_on_the_curve_of_their_metric_and_data(tmp_path: Path) -> None:
    run = make_full_run(tmp_path / "run")
    write_report([run], tmp_path / "out")
    pictures = re.findall(r"<svg.*?</svg>", (tmp_path / "out").read_text(), re.DOTALL)
    marked = [picture for picture in pictures[:8] if ALARM in picture]
    assert len(marked) == 1 and "log p(chosen)" in marked[0]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write(run / "metrics.jsonl", [line for line in lines if line["kind"] != "alarm"])
    write_report([run], tmp_path / "out")
    text = (tmp_path / "out").read_text()
    assert "Alarms" not in headings(text) and "alarm (triangle)" not in text


def test_seeds_are_grouped_and_their_intervals_are_students(tmp_path: Path) -> None:
    folders = [make_full_run(tmp_path / f"a-seed{seed}", seed=seed) for seed in (1, 2)]
    folders.append(make_full_run(tmp_path / "b", loss="dpo"))
    groups = group_runs(read_runs(folders))
    assert [(group.name, len(group.runs)) for group in groups] == [("a (2 seeds)", 2), ("b", 1)]
    assert summary([1.0, 3.0]) == "2 ± 13"  # 12.706 * sqrt(2) / sqrt(2)
    assert summary([1.0, 2.0, 3.0, 4.0]) == "2.5 ± 2.1"  # 3.182 * 1.291 / 2
    assert summary([0.125]) == "0.125" and summary([]) == ""


def test_a_large_run_gives_a_small_page(tmp_path: Path) -> None:
    runs = [make_full_run(tmp_path / f"run{seed}", seed=seed, steps=12_000) for seed in range(2)]
    write_report(runs, tmp_path / "out")
    assert (tmp_path / "out").stat().st_size < 3_000_000


def test_thinning_keeps_the_extremes() -> None:
    points = [(step, float(step == 7777)) for step in range(20_000)]
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS and (7777, 1.0) in kept and kept == sorted(kept)
    assert thinned(points[:MAX_POINTS]) == points[:MAX_POINTS]


def test_numbers_that_are_none_are_not_drawn(tmp_path: Path) -> None:
    run = make_full_run(tmp_path / "run")
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"kind": "train", "step": 61, "loss": NaN, "spo/gap": Infinity}\n')
    write_report([run], tmp_path / "out")
    assert "nan" not in {cell.lower() for cell in Page((tmp_path / "out").read_text()).cells}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("samples.jsonl", '{"step": 1}\n{"step": 2}\n', "samples.jsonl line 1: not a sample"),
        ("metrics.jsonl", '{"kind": "eval", "step": 1}\n', "metrics.jsonl line 1: not a metrics line"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl line 1: not a metrics line"),
        ("metrics.jsonl", "\udcff\n", "metrics.jsonl is damaged"),
        ("held_out/held_out.json", '{"pairs": [{"row": 1}]}', "held_out.json is damaged"),
        ("held_out/held_out.json", "{", "held_out.json is damaged"),
        ("status.json", "[]", "status.json is damaged"),
        ("config.yaml", "a: [", "config.yaml is damaged"),
    ],
)
def test_a_damaged_part_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    run = make_full_run(tmp_path / "run")
    (run / name).write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        write_report([run], tmp_path / "out")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def test_contrast() -> None:
    """Contrast satisfies WCAG 2 (4.5 for text, 3 for lines of plots) in light and dark mode."""
    for theme in (LIGHT, DARK):
        for name in ("text", "muted", "link"):
            assert contrast(theme[name], theme["back"]) >= 4.5, name
        for colour in (*PALETTE, *SIDES.values(), ALARM):
            assert contrast(colour, theme["back"]) >= 3, (colour, theme["back"])


def test_report_of_a_real_run(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, pairs=16, held_out=8, training={"eval_every": 2})
    trains = [("train", str(config), [f"output={tmp_path}/s{seed}", f"training.seed={seed}"]) for seed in (1, 2)]
    run_jobs([("reference", str(config), []), *trains], 1)
    done = cli("report", str(tmp_path / "s1"), str(tmp_path / "s2"), "--out", str(tmp_path / "out.html"))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out.html").read_text()
    assert {"Results", "Curves", "Speed", "Provenance"} <= set(headings(text))
    assert "(2 seeds)" in text and "megatron-core" in text
