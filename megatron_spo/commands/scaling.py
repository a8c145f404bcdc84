"""`megatron-spo scaling`: fit scaling laws, run studies of many runs."""

import argparse
import sys
from pathlib import Path
from typing import Any

LAW_NAMES = ("chinchilla", "power", "overoptimization", "stability")
"""As in fit.LAWS, which takes SciPy to import."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `fit` and `study` with their options to the parser of `scaling`."""
    commands = parser.add_subparsers(dest="part", metavar="fit|study", required=True)
    fit = commands.add_parser("fit", help="fit a law to points; says so where they do not determine it")
    fit.add_argument("points", metavar="POINTS", type=Path, help="CSV or Parquet, such as the table of a study")
    fit.add_argument("--law", choices=LAW_NAMES, required=True, help="chinchilla: loss of N and D; power: loss of x; "
                     "overoptimization: reward of kl; stability: steps of lr, beta, lambda, N")  # fmt: skip
    fit.add_argument("--out", type=Path, required=True, help="JSON to write")
    fit.add_argument("--plot", type=Path, help="SVG to write: the fit and its residuals")
    fit.add_argument("--column", action=_Pairs, default={}, metavar="NAME=COLUMN", help="the points' name of the law's "
                     "column NAME; repeat it for several")  # fmt: skip
    fit.add_argument("--flops", type=float, nargs="+", default=[], help="chinchilla: the best N and D for these, 6 N D")
    fit.add_argument("--stable-steps", type=float, nargs="+", default=[], metavar="STEPS", help="stability: lambda "
                     "with which a run stays within the bound for so many steps")  # fmt: skip
    fit.add_argument("--at", action=_Pairs, default={}, metavar="CAUSE=VALUE", help="stability: setting of such a run "
                     "(default: the geometric mean of the points)")  # fmt: skip
    fit.add_argument("--bootstrap", type=int, default=1000, help="refits that the intervals come from [%(default)s]")
    fit.add_argument("--seed", type=int, default=0, help="of these refits' draws [%(default)s]")

    study = commands.add_parser("study", help="run what a file asks for, many runs, and make one table")
    study.add_argument("study", metavar="STUDY.yaml", type=Path)
    study.add_argument("--workers", type=int, default=1, help="runs at a time; they share out the cores [%(default)s]")
    study.add_argument("--only", type=int, nargs="+", metavar="N", help="of all runs, these, counted from 1")
    does = study.add_mutually_exclusive_group()
    does.add_argument("--table", action="store_true", help="make the table again, run nothing")
    does.add_argument("--list", action="store_true", help="check the study and show its runs, run nothing")
    does.add_argument("--slurm", choices=["print", "submit"], help="the runs as an array of slurm/array_study.sh")


def run(options: argparse.Namespace) -> None:
    """Fit or run; exit code 1 if a run of the study is not done. Raises what `megatron_spo.scaling.run` does."""
    from megatron_spo.scaling.run import fit_points, run_study

    if options.part == "fit":
        print(fit_points(options))
    elif not run_study(options):
        sys.exit(1)


class _Pairs(argparse.Action):
    """Collects NAME=VALUE; `--at` has numbers."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        name, equals, value = values.partition("=")
        if not name or not equals or not value:
            parser.error(f"{option} {values}: must look like NAME=VALUE")
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), name: value})
