"""`megatron-spo scaling`: fits scaling laws and runs studies of many runs."""

import argparse
import sys
from pathlib import Path
from typing import Any

LAW_NAMES = ("chinchilla", "power", "overoptimization", "stability")
"""Names in fit.LAWS, repeated here because importing that module requires SciPy."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands `fit` and `study` with their options."""
    commands = parser.add_subparsers(dest="part", metavar="fit|study", required=True)
    fit = commands.add_parser("fit", help="fit a law to points; warns if the points do not determine it")
    fit.add_argument("points", metavar="POINTS", type=Path, help="CSV or Parquet file, such as the table of a study")
    fit.add_argument("--law", choices=LAW_NAMES, required=True, help="chinchilla: loss from N and D; power: loss from "
                     "x; overoptimization: reward from kl; stability: steps from lr, beta, lambda and N")  # fmt: skip
    fit.add_argument("--out", type=Path, required=True, help="JSON file to write")
    fit.add_argument("--plot", type=Path, help="SVG, PNG or PDF file to write, by its name: "
                     "the fit and its residuals")  # fmt: skip
    fit.add_argument("--column", action=_Pairs, default={}, metavar="NAME=COLUMN", help="name in POINTS of the law's "
                     "column NAME; can be repeated")  # fmt: skip
    fit.add_argument("--flops", type=float, nargs="+", default=[], help="chinchilla: compute budgets 6 N D for "
                     "which to give the optimal N and D")  # fmt: skip
    fit.add_argument("--stable-steps", type=float, nargs="+", default=[], metavar="STEPS", help="stability: give "
                     "the lambda with which a run stays within the bound for this many steps")  # fmt: skip
    fit.add_argument("--at", action=_Pairs, default={}, metavar="CAUSE=VALUE", help="stability: setting of that run "
                     "[geometric mean of the points]")  # fmt: skip
    fit.add_argument("--bootstrap", type=int, default=1000, help="number of bootstrap refits for the intervals "
                     "[%(default)s]")  # fmt: skip
    fit.add_argument("--seed", type=int, default=0, help="random seed of the bootstrap [%(default)s]")

    study = commands.add_parser("study", help="run the runs of a study file and write one table")
    study.add_argument("study", metavar="STUDY.yaml", type=Path, help="study file")
    study.add_argument("--workers", type=int, default=1, help="parallel runs, which share the CPU cores [%(default)s]")
    study.add_argument("--only", type=int, nargs="+", metavar="N", help="run only these runs, counted from 1")
    does = study.add_mutually_exclusive_group()
    does.add_argument("--table", action="store_true", help="only write the table again")
    does.add_argument("--list", action="store_true", help="only check the study and list its runs")
    does.add_argument("--slurm", choices=["print", "submit"], help="print or submit the runs as a job array of "
                      "slurm/array_study.sh")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Fits a law or runs a study. The exit code is 1 if a run of the study is not complete.

    Raises the errors of `megatron_spo.scaling.run`.
    """
    from megatron_spo.scaling.run import fit_points, run_study

    if options.part == "fit":
        print(fit_points(options))
    elif not run_study(options):
        sys.exit(1)


class _Pairs(argparse.Action):
    """Collects NAME=VALUE arguments in a dict."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        name, equals, value = values.partition("=")
        if not name or not equals or not value:
            parser.error(f"{option} {values}: must have the form NAME=VALUE")
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), name: value})
