"""The page of a study: its figures, fits and sentences, from a real study."""

from pathlib import Path
from typing import Any

import pytest

from megatron_spo.cli import main
from megatron_spo.scaling.study import read_study
from tests.scaling.test_study import write_study


def test_the_page_of_a_study(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec: dict[str, Any] = {
        "title": "Rows and methods",
        "set": {"training.steps": 6},
        "vary": {
            "method": {"simpo": {}, "control": {"spo.schedule": "sft"}},
            "data.rows": [8, 16, 32],
        },
        "metrics": {"eval/loss/sft": None, "N": "number of parameters"},
        "scatters": [{"x": "eval/loss/sft", "y": "N", "by": "method"}, {"x": "nothing", "y": "N"}],
        "fits": [
            {"law": "pure_power", "columns": {"x": "data.rows"}, "by": "method"},
            {"law": "chinchilla", "columns": {"loss": "eval/nothing"}},
        ],
    }
    study = write_study(folder, "paged", **spec)
    assert main(["scaling", "report", str(study)]) == 0
    assert "6 missing" in (folder / "paged/report.html").read_text()
    for run in read_study(study).runs:  # as a job script would
        assert main(["train", str(folder / "base.yaml"), *run.overrides, f"output={run.directory}"]) == 0
    capsys.readouterr()
    out = folder / "page.html"
    assert main(["scaling", "report", str(study), "--out", str(out), "--bootstrap", "100"]) == 0
    printed = capsys.readouterr().out
    assert "Law pure_power by method:\n  simpo: " in printed
    assert "Law chinchilla: no fit: " in printed and "column 'eval/nothing' is missing" in printed
    page = out.read_text()
    assert "<h1>Rows and methods</h1>" in page and "6 done" in page
    assert "method=control, rows=16" in page
    assert "SFT loss on held-out pairs, nats per chosen token: from " in page
    assert "Number of parameters: " in page and "</i>method simpo</span>" in page
    assert "No finished run has these columns." in page and "There is no fit: " in page
    assert page.count("<svg") >= 6
    assert main(["scaling", "report", str(study), "--bootstrap", "5"]) == 2
