"""`megatron-spo report`: one HTML page about runs."""

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directory")
    parser.add_argument("--out", type=Path, required=True, help="HTML file to write")


def run(options: argparse.Namespace) -> None:
    """Write the page. Raises what `write_report` does."""
    from megatron_spo.report import write_report

    write_report(options.runs, options.out)
