"""Implements the commands `scaling fit` and `scaling study`."""

import argparse
import json
import os
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from megatron_spo.errors import UserError
from megatron_spo.files import check_output, write_output
from megatron_spo.meter import Meter
from megatron_spo.report import figures
from megatron_spo.scaling.estimate import before_start
from megatron_spo.scaling.fit import LAWS, attempt
from megatron_spo.scaling.groups import fit_groups
from megatron_spo.scaling.law import Ask, Law
from megatron_spo.scaling.models import write_models
from megatron_spo.scaling.page import write_study_page
from megatron_spo.scaling.plot import draw, panels_of, panels_of_groups
from megatron_spo.scaling.points import read_groups
from megatron_spo.scaling.slurm import submit
from megatron_spo.scaling.steps import Runner
from megatron_spo.scaling.study import Study, StudyRun, check_configurations, interleaved, read_study
from megatron_spo.scaling.table import make_table, shown
from megatron_spo.scaling.text import fit_text, groups_text

SHOWN = 40
"""Most runs in the table before the start; --list shows all."""


def fit_points(options: argparse.Namespace) -> str:
    """Writes FIT.json and the plot; returns the parameters as text.

    Raises:
        UserError: If options or points are invalid, or if the points do not determine the law; in the latter case, both
            files are written with what was found.
    """
    law = LAWS[options.law]
    _check(options, law)
    ask = Ask(options.flops, options.stable_steps, number_pairs(options.at, "--at"))
    groups = read_groups(options.points, law.required, law.optional, options.column, by=options.by, only=options.only)
    given = {"bootstrap": options.bootstrap, "seed": options.seed}
    if options.by is None:
        found = attempt(law, groups[""], ask, **given)
        report, panels, text = found.report, panels_of(found), fit_text(found)
        refusals = [found.refusal] if found.refusal else []
    else:
        grouped = fit_groups(law, options.by, groups, ask, **given)
        report, panels, text = grouped.report, panels_of_groups(grouped), groups_text(grouped)
        refusals = [one.refusal for one in grouped.fits.values() if one.refusal]
        refusals = refusals if len(refusals) == len(grouped.fits) else []
    write_output(options.out, json.dumps(report, indent=1) + "\n")
    if options.plot:
        write_output(options.plot, figures.file_image(draw(panels), options.plot.suffix.lower()))
    if refusals:
        files = f"{options.out} and {options.plot} have" if options.plot else f"{options.out} has"
        raise UserError(f"{refusals[0]}\n{files} the points and what was found")
    return text


def _check(options: argparse.Namespace, law: Law) -> None:
    _check_bootstrap(options.bootstrap)
    for number in (*options.flops, *options.stable_steps):
        if not 0 < number < float("inf"):
            raise UserError(f"--flops and --stable-steps must be positive, not {number:g}")
    for name, given in (("flops", options.flops), ("stable_steps", options.stable_steps), ("at", options.at)):
        if given and law.name != ("chinchilla" if name == "flops" else "stability"):
            raise UserError(f"--{name.replace('_', '-')} is not supported with --law {law.name}; omit it")
    for path in (options.out, *([options.plot] if options.plot else [])):
        check_output(path)
    if options.plot and options.plot.suffix.lower() not in figures.IMAGES:
        raise UserError(f"--plot {options.plot}: the name must end in {', '.join(figures.IMAGES)}")


def report_study(options: argparse.Namespace) -> str:
    """Writes the page of a study; returns what its fits show."""
    _check_bootstrap(options.bootstrap)
    study = read_study(options.study, options.scale)
    out = options.out or study.out / "report.html"
    return write_study_page(study, out, bootstrap=options.bootstrap, seed=options.seed)


def _check_bootstrap(count: int) -> None:
    if count < 100:
        raise UserError(f"--bootstrap {count} must be at least 100, which the intervals need")


def run_study(options: argparse.Namespace) -> bool:
    """Runs a study and prints its table; returns whether all requested runs are done."""
    if options.workers < 1:
        raise UserError(f"--workers {options.workers} must be at least 1")
    study = read_study(options.study, options.scale)
    runs = [run for run in study.runs if not options.only or run.number in options.only]
    if missing := sorted(set(options.only or ()) - {run.number for run in runs}):
        raise UserError(f"--only {missing[0]}: the study has only runs 1 to {len(study.runs)}")
    if not options.table:
        if not options.list:
            write_models(study)
        check_configurations(study)
    if options.slurm:
        submit(study, really=options.slurm == "submit")
        return True
    if options.list:
        print("\n".join(f"{run.number:4d}  {' '.join(run.overrides)}" for run in runs))
    if not options.table:
        most = len(runs) if options.list else SHOWN
        table = before_start(study, runs, options.gpu, options.gpus, workers=options.workers, most=most)
        print(table, flush=True)
    if options.list:
        return True
    if not options.table:
        run_all(study, interleaved(runs), options.workers)
    rows = make_table(study)
    print(shown(study, rows))
    print(f"{study.out / 'table.csv'}, {study.out / 'table.parquet'}")
    return options.table or all(rows[run.number - 1]["state"] == "done" for run in runs)


def run_all(study: Study, runs: Sequence[StudyRun], workers: int) -> None:
    """Runs `workers` runs at a time, each with its share of the cores.

    Raises:
        KeyboardInterrupt: On SIGINT or SIGTERM, after the runs have saved and ended.
    """
    runner = Runner(threads=max(1, len(os.sched_getaffinity(0)) // workers))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        ThreadPoolExecutor(workers) as pool,
        Meter(study.path.stem, len(runs), "runs") as meter,
    ):
        try:
            for done in as_completed([pool.submit(runner.run, study, run) for run in runs]):
                done.result()
                meter.advance()
        except BaseException:
            runner.stop()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def number_pairs(given: Mapping[str, str], option: str) -> dict[str, float]:
    """Returns the values of NAME=VALUE options as positive numbers; raises UserError naming one that is not."""
    return {name: _positive(value, f"{option} {name}={value}") for name, value in given.items()}


def _positive(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(f"{where} must be a positive number")
    return number
