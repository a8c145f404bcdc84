"""`megatron-spo status`: shows where a run, a job or a study stands."""

import argparse
import sys
import time
from pathlib import Path

EVERY = 10.0
"""Default seconds between two outputs of --watch."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("folders", metavar="RUN_OR_STUDY", type=Path, nargs="+", help="run directory, output folder "
                        "of a job script or of a study, or study file (YAML)")  # fmt: skip
    parser.add_argument("--watch", type=float, nargs="?", const=EVERY, metavar="SECONDS", help="show it again every so "
                        f"many seconds until all runs have ended [{EVERY:g}]")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Prints where the runs stand. Raises the errors of `find_runs`."""
    from megatron_spo.errors import UserError

    if options.watch is not None and options.watch <= 0:
        raise UserError(f"--watch {options.watch:g} must be positive")
    while True:
        text, ended = _shown(options.folders)
        if options.watch is not None and sys.stdout.isatty():
            print("\033[H\033[2J", end="")  # clears the terminal
        print(text, flush=True)
        if options.watch is None or ended:
            return
        time.sleep(options.watch)


def _shown(folders: list[Path]) -> tuple[str, bool]:
    """Returns the text, and whether all runs have ended."""
    from megatron_spo.report.status import described, find_runs, read_status, table

    found = [one for folder in folders for one in (_of_study(folder) if folder.is_file() else find_runs(folder))]
    statuses = [read_status(name, folder) for name, folder in found]
    text = described(statuses[0]) if len(statuses) == 1 else table(statuses)
    return text, all(one.state in ("done", "failed", "stopped") for one in statuses)


def _of_study(file: Path) -> list[tuple[str, Path]]:
    from megatron_spo.scaling.study import read_study

    study = read_study(file)
    return [(f"{run.number}  {' '.join(run.overrides)}"[:60], run.directory) for run in study.runs]
