"""A study as a job array: the lines that slurm/array_study.sh reads, one run each."""

import shlex
import subprocess
from pathlib import Path

from megatron_spo.errors import UserError
from megatron_spo.scaling.steps import is_done, steps_of
from megatron_spo.scaling.study import Study, StudyRun

SCRIPT = Path("slurm/array_study.sh")
CACHE = "reference.cache="


def submit(study: Study, *, really: bool) -> None:
    """Write OUT/lines.txt and print the command that submits it, or run that command.

    Task N of the array trains run N into OUT/N/run, where a later call of `scaling study` finds it done, does what
    `after` asks for and makes the table. The array's own first job fills a reference cache for all runs.

    Raises:
        UserError: a step of `before` is neither done nor a reference pass; runs share caches in groups; no script.
    """
    _check_before(study)
    caches = [_cache(run) for run in study.runs]
    shared = len(set(caches)) == 1
    if not shared and len(set(caches)) < len(caches):
        raise UserError(
            f"{study.path}: some runs share a reference.cache, not all do; two tasks would fill it at once. Take "
            "one cache for all, give each run its own, or fill them first: megatron-spo reference"
        )
    lines = [" ".join(shlex.quote(one) for one in run.overrides if not (shared and one.startswith(CACHE)))
             for run in study.runs]  # fmt: skip
    study.out.mkdir(parents=True, exist_ok=True)
    (study.out / "lines.txt").write_text("".join(f"{line}\n" for line in lines))
    given = {"SPO_CONFIG": study.base, "SPO_OUT": study.out.absolute(), "SPO_STUDY": study.out.absolute() / "lines.txt"}
    command = ["env", *(f"{name}={value}" for name, value in given.items()), "bash", str(SCRIPT)]
    if not really:
        print(shlex.join(command))
        return
    if not SCRIPT.is_file():
        raise UserError(f"{SCRIPT}: no such file; submit from the repository's root")
    done = subprocess.run(command)
    if done.returncode:
        raise UserError(f"{SCRIPT} ended with code {done.returncode}; what it said stands above")


def _check_before(study: Study) -> None:
    for run in study.runs:
        for step, place in steps_of(study, run):
            if step.shared and "reference" not in step.words and not is_done(run, step, place):
                raise UserError(
                    f"{study.path}: step {step.name} of `before` is not done, and the job array would not do it: run "
                    f"it first, {shlex.join(step.words)}, and take it out of the study"
                )


def _cache(run: StudyRun) -> str | None:
    return next((one for one in run.overrides if one.startswith(CACHE)), None)
