"""Runs the commands of a study, each only once, and records which are done."""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_spo.files import write_whole
from megatron_spo.scaling.study import PROGRAMS, Step, Study, StudyRun, run_name, varied_names
from megatron_spo.subcommands import Subcommands, reason

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """The files of a step: mark (written when it is done), lock and log.

    The mark holds `key`, a checksum of all commands up to this step.
    """

    mark: Path
    lock: Path
    log: Path
    key: str

    @property
    def is_done(self) -> bool:
        return self.mark.is_file() and self.mark.read_text() == self.key


@dataclass(frozen=True)
class Failure:
    """Why a run failed: the step, its exit code and its error message."""

    step: str
    code: int
    reason: str


def steps_of(study: Study, run: StudyRun, threads: int | None = None) -> list[tuple[Step, Place]]:
    """Returns a run's commands in order; the number of threads is not part of their checksums."""
    own = f"output={run.directory}"
    train = Step("train", (*PROGRAMS["megatron-spo"], "train", str(study.base), *run.overrides, own))
    digest = hashlib.sha256(study.base.read_bytes())
    placed = []
    for step in (*run.before, train, *run.after):
        # without the interpreter, whose path may change, and as when training logged no progress, so that finished
        # steps stay finished
        words = [*step.words[1:], *(["logging.progress=false"] if step is train else [])]
        digest.update(json.dumps(words).encode())
        folder = study.out / "before" if step.shared else run.folder / "steps"
        place = Place(
            folder / step.name, folder / f".{step.name}.lock", folder / f"{step.name}.log", digest.hexdigest()
        )
        placed.append((step, place))
    return placed


def is_done(run: StudyRun, step: Step, place: Place) -> bool:
    """Returns whether a step is done; if a job script trained the run, the steps before training count as done."""
    if place.is_done:
        return True
    by_script = not (run.folder / "steps/train").exists() and status(run).get("state") == "done"
    return by_script and (step.shared or step.name == "train")


def status(run: StudyRun) -> dict[str, Any]:
    """Returns the content of `train`'s status.json, empty if there is none."""
    path = run.directory / "status.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@dataclass
class Runner(Subcommands):
    """Runs steps, called from several threads; `threads` is the number of threads of each command."""

    threads: int = 1
    _failed: dict[Path, Failure] = field(default_factory=dict)

    def run(self, study: Study, run: StudyRun) -> None:
        """Runs all steps of a run that are not done; a failure is recorded and ends only this run."""
        record = run.folder / "failure.json"
        name = f"run {run.number} of {len(study.runs)} ({run_name(run, varied_names(study.runs))})"
        begin = time.monotonic()
        for step, place in steps_of(study, run):
            failure = self._step(run, step, place, name)
            if self.stopping.is_set():
                return
            if failure is not None:
                run.folder.mkdir(parents=True, exist_ok=True)
                write_whole(record, json.dumps(failure.__dict__))
                LOG.warning(f"{name}: {failure.step} failed: {failure.reason}")
                return
        record.unlink(missing_ok=True)
        LOG.info(f"{name}: done, {time.monotonic() - begin:.0f} s")

    def _step(self, run: StudyRun, step: Step, place: Place, name: str) -> Failure | None:
        place.mark.parent.mkdir(parents=True, exist_ok=True)
        with self.held(place.lock) as lock:
            if self.stopping.is_set() or is_done(run, step, place):
                return None
            if place.mark in self._failed:  # a shared step that failed in this call is not tried again
                return self._failed[place.mark]
            LOG.info(f"{name}: {step.name}; log in {place.log}")
            code = self.call(self._words(step), place.log, lock)
            if code == 0:
                write_whole(place.mark, place.key)
                return None
            failure = Failure(step.name, code, reason(place.log))
            if step.shared:
                self._failed[place.mark] = failure
            return failure

    def _words(self, step: Step) -> Sequence[str]:
        limited = (f"training.threads={self.threads}",) if step.name == "train" else ()
        return ("env", f"OMP_NUM_THREADS={self.threads}", *step.words, *limited)
