"""One self-contained HTML page about one or several runs, made from their run directories alone."""

from collections.abc import Sequence
from pathlib import Path

from megatron_spo.errors import UserError
from megatron_spo.report.page import write_page
from megatron_spo.report.runs import read_runs
from megatron_spo.report.sections import make_sections


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Writes the page `out` about the run directories `runs`. Raises UserError if one of them is none."""
    if not runs:
        raise UserError("report: name at least one run directory")
    read = read_runs([Path(run) for run in runs])
    write_page(Path(out), "SPO: " + ", ".join(read), make_sections(read))
