"""Reports: one self-contained HTML page about one or several runs, made from their run directories."""

from collections.abc import Sequence
from pathlib import Path

from megatron_spo.errors import UserError
from megatron_spo.report.overview import overview
from megatron_spo.report.page import write_page
from megatron_spo.report.runs import read_runs
from megatron_spo.report.sections import make_sections

LONGEST_TITLE = 50
"""Most characters of a title that lists the names of several runs."""


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Writes the page `out` about the run directories `runs`; raises UserError if one of them is not readable."""
    if not runs:
        raise UserError("report: no run directory given; name at least one")
    read = read_runs([Path(run) for run in runs])
    names = ", ".join(read)
    title = names if len(read) == 1 or len(names) <= LONGEST_TITLE else f"{len(read)} runs"
    write_page(Path(out), f"SPO: {title}", make_sections(read), lead=overview(read))
