"""Submits a study as a job array: writes the lines of overrides that slurm/array_study.sh reads, one per run."""

import shlex
import subprocess
from pathlib import Path

from megatron_spo.errors import UserError
from megatron_spo.scaling.steps import is_done, steps_of
from megatron_spo.scaling.study import Study, StudyRun

SCRIPT = "array_study.sh"
CACHE = "reference.cache="


def scripts_home() -> Path:
    """Returns the folder with the job scripts in `slurm/`: the root of the repository, or the installed package."""
    package = Path(__file__).parents[1]
    return package if (package / "slurm" / "lib.sh").is_file() else package.parent


def submit(study: Study, *, really: bool) -> None:
    """Writes OUT/lines.txt, and prints the command that submits it, or runs that command.

    Task N of the array trains run N into OUT/N/run. A later call of `scaling study` finds it done, runs the steps of
    `after` and writes the table. The array's first job fills a reference cache for all runs.

    Raises:
        UserError: If a step of `before` is neither done nor a reference pass, or only some runs share a cache.
    """
    _check_before(study)
    caches = [_cache(run) for run in study.runs]
    shared = len(set(caches)) == 1
    if not shared and len(set(caches)) < len(caches) and not _filled(study):
        raise UserError(
            f"{study.path}: only some runs share a reference.cache, and two tasks would fill it at the same time; use "
            "one cache for all runs, one for each run, or fill them first with megatron-spo reference"
        )
    lines = [" ".join(shlex.quote(one) for one in run.overrides if not (shared and one.startswith(CACHE)))
             for run in study.runs]  # fmt: skip
    study.out.mkdir(parents=True, exist_ok=True)
    (study.out / "lines.txt").write_text("".join(f"{line}\n" for line in lines))
    script = scripts_home() / "slurm" / SCRIPT
    given = {"SPO_HOME": scripts_home(), "SPO_CONFIG": study.base.absolute(), "SPO_OUT": study.out.absolute(),
             "SPO_STUDY": study.out.absolute() / "lines.txt"}  # fmt: skip
    command = ["env", *(f"{name}={value}" for name, value in given.items()), "bash", str(script)]
    if not really:
        print(shlex.join(command))
        return
    done = subprocess.run(command)
    if done.returncode:
        raise UserError(f"{script} failed with exit code {done.returncode}; see its output above")


def _check_before(study: Study) -> None:
    for run in study.runs:
        for step, place in steps_of(study, run):
            if step.shared and "reference" not in step.words and not is_done(run, step, place):
                raise UserError(
                    f"{study.path}: step {step.name} of `before` is not done, and the job array does not run it; run "
                    f"{shlex.join(step.words)} first, and remove the step from the study"
                )


def _filled(study: Study) -> bool:
    """Returns whether every run has a reference pass in `before` that is done."""
    passes = [[is_done(run, step, place) for step, place in steps_of(study, run) if step.shared and
               "reference" in step.words] for run in study.runs]  # fmt: skip
    return all(done and all(done) for done in passes)


def _cache(run: StudyRun) -> str | None:
    return next((one for one in run.overrides if one.startswith(CACHE)), None)
