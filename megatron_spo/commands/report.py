"""`megatron-spo report`: writes an HTML page about one or more runs."""

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directory")
    parser.add_argument("--out", type=Path, required=True, help="HTML file to write")


def run(options: argparse.Namespace) -> None:
    """Writes the page. Raises the errors of `write_report`."""
    from megatron_spo.report import write_report

    write_report(options.runs, options.out)
