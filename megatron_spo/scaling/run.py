"""Implements the commands `scaling fit` and `scaling study`."""

import argparse
import json
import os
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from megatron_spo.errors import UserError
from megatron_spo.files import check_output, write_output
from megatron_spo.meter import Meter
from megatron_spo.report.figures import IMAGES
from megatron_spo.scaling.fit import LAWS, fit
from megatron_spo.scaling.law import Ask
from megatron_spo.scaling.models import write_models
from megatron_spo.scaling.plot import draw
from megatron_spo.scaling.points import read_points
from megatron_spo.scaling.slurm import submit
from megatron_spo.scaling.steps import Runner
from megatron_spo.scaling.study import Study, StudyRun, check_configurations, read_study
from megatron_spo.scaling.table import make_table, shown


def fit_points(options: argparse.Namespace) -> str:
    """Writes FIT.json and the plot; returns the parameters as text."""
    law = LAWS[options.law]
    if options.bootstrap < 100:
        raise UserError(f"--bootstrap {options.bootstrap} must be at least 100, which the intervals need")
    for number in (*options.flops, *options.stable_steps):
        if not 0 < number < float("inf"):
            raise UserError(f"--flops and --stable-steps must be positive, not {number:g}")
    for name, given in (("flops", options.flops), ("stable_steps", options.stable_steps), ("at", options.at)):
        if given and law.name != ("chinchilla" if name == "flops" else "stability"):
            raise UserError(f"--{name.replace('_', '-')} is not supported with --law {law.name}; omit it")
    for path in (options.out, *([options.plot] if options.plot else [])):
        check_output(path)
    if options.plot and options.plot.suffix.lower() not in IMAGES:
        raise UserError(f"--plot {options.plot}: the name must end in {', '.join(IMAGES)}")
    points = read_points(options.points, law.required, law.optional, options.column)
    ask = Ask(options.flops, options.stable_steps, number_pairs(options.at, "--at"))
    found = fit(law, points, ask, bootstrap=options.bootstrap, seed=options.seed)
    write_output(options.out, json.dumps(found.report, indent=1) + "\n")
    if options.plot:
        write_output(options.plot, draw(found, options.plot.suffix.lower()))
    lines = [f"{law.name}: {found.report['points']} points, held out {found.report['held_out']['points']}: mean "
             f"absolute error {found.report['held_out']['mean_absolute']:.3g} ({law.unit})"]  # fmt: skip
    for name, (low, high) in found.report["intervals"].items():
        lines.append(f"{name:>10s} {found.values[name]:12.5g}   {low:.5g} to {high:.5g}")
    return "\n".join([*lines, *_answers(found.report), f"all numbers: {options.out}"])


def _answers(report: Mapping[str, Any]) -> list[str]:
    """Returns one line for each value of --flops and --stable-steps."""
    lines = [f"{one['flops']:.3g} FLOPs: N = {one['N']:.3g} parameters and D = {one['D']:.3g} tokens give the lowest "
             f"loss, {one['loss']:.4g}" for one in report.get("compute_optimal", {}).get("at", [])]  # fmt: skip
    for one in report.get("stable_lambda", []):
        known = "no lambda keeps a run" if one["lambda"] is None else f"lambda = {one['lambda']:.3g} keeps a run"
        if one["lambda_interval"]:
            known += f" ({one['lambda_interval'][0]:.3g} to {one['lambda_interval'][1]:.3g})"
        lines.append(f"{one['steps']:,.0f} steps: {known} within the bound with probability {one['probability']:g}")
    return lines


def run_study(options: argparse.Namespace) -> bool:
    """Runs a study and prints its table; returns whether all requested runs are done."""
    if options.workers < 1:
        raise UserError(f"--workers {options.workers} must be at least 1")
    study = read_study(options.study)
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
        return True
    if not options.table:
        run_all(study, runs, options.workers)
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
