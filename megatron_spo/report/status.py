"""Where runs stand, from the files of their directories and, for SLURM jobs, the queue."""

import json
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from tabulate import tabulate

from megatron_spo.errors import UserError
from megatron_spo.meter import duration, number
from megatron_spo.report.runs import Run, is_number, natural, read_run
from megatron_spo.subcommands import ending

RECENT = 20
"""Number of last lines over which the speed is averaged."""
SILENT = 300.0
"""Seconds without a new line or phase after which the last sign of life is shown."""
WAITS = {
    "Resources": "free nodes",
    "Priority": "jobs with a higher priority",
    "Dependency": "another job",
    "DependencyNeverSatisfied": "a job that failed: cancel this one",
    "BeginTime": "its begin time (a requeued job waits two minutes)",
    "JobHeldUser": "its release: scontrol release",
    "JobHeldAdmin": "its release by an administrator",
    "QOSMaxJobsPerUserLimit": "your other jobs (limit of the QOS)",
    "AssocGrpGRES": "GPUs of your account (its limit is reached)",
    "ReqNodeNotAvail": "nodes that are down or reserved",
}
"""Reasons of SLURM -> what a pending job waits for."""


@dataclass(frozen=True)
class Job:
    """The SLURM job of a run.

    Attributes:
        number: The job's id.
        attempt: How often it has started.
        state: Its state in the queue; "" if it is not in the queue, or if there is no SLURM here.
        waits: What it waits for, if it is pending.
        nodes: Its nodes, as SLURM names them.
        said: The last line of its log.
    """

    number: str
    attempt: int
    state: str
    waits: str
    nodes: str
    said: str


@dataclass(frozen=True)
class Status:
    """A run directory, its SLURM job if there is one, and why the run failed if a study says so."""

    name: str
    folder: Path
    run: Run | None
    job: Job | None
    failure: str

    @property
    def state(self) -> str:
        """The state of the run, or of its job while there is no run."""
        if self.run is not None and self.run.state != "unknown":
            return "waiting" if self.job is not None and self.job.waits else self.run.state
        if self.failure:
            return "failed"
        return "waiting" if self.job is None or self.job.waits else "starting"

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl."""
        return int(self.run.last(None)["step"]) if self.run else 0

    @property
    def steps(self) -> int | None:
        """The number of steps, or None if it is not known yet."""
        known = self.run.status.get("steps") if self.run else None
        return int(known) if known else None

    @property
    def seconds(self) -> float | None:
        """Mean seconds of the last steps."""
        lines = self.run.of(None)[-RECENT:] if self.run else []
        found = [line["seconds"] for line in lines if is_number(line.get("seconds"))]
        return mean(found) if found else None

    @property
    def left(self) -> str:
        """Estimate of the time left, without evaluations and saving; empty if the run has ended or has no step."""
        if self.steps is None or self.seconds is None or self.state in ("done", "failed"):
            return ""
        return duration((self.steps - self.step) * self.seconds)


def find_runs(folder: Path) -> list[tuple[str, Path]]:
    """Returns (name, run directory) of a run directory, the output folder of a job, or that of a study.

    Raises:
        UserError: There is no run in the folder.
    """
    if (folder / "status.json").is_file() or (folder / "metrics.jsonl").is_file():
        return [(str(folder), folder)]
    if (folder / "run").is_dir() or (folder / "logs/job.log").is_file():
        return [(str(folder), folder / "run")]
    numbered = [one for one in folder.glob("*") if one.name.isdigit() and one.is_dir()]
    if numbered:
        return [(one.name, one / "run") for one in sorted(numbered, key=lambda one: natural(one.name))]
    raise UserError(f"{folder} holds no run: it has neither status.json, run/ nor numbered folders of a study; give "
                    "the output folder of `train`, of a job script or of a study")  # fmt: skip


def read_status(name: str, folder: Path) -> Status:
    """Returns where the run in `folder` stands."""
    failure = folder.parent / "failure.json"
    why = json.loads(failure.read_text()) if failure.is_file() else {}
    reason = f"{why['step']} {ending(why['code'])}: {why['reason']}" if why else ""
    return Status(name, folder, _read(folder), _job(folder), reason)


def _read(folder: Path) -> Run | None:
    if (folder / "metrics.jsonl").is_file():
        return read_run(folder)
    if not (folder / "status.json").is_file():
        return None
    status = {key: json.dumps(value) for key, value in json.loads((folder / "status.json").read_text()).items()}
    return Run([], {}, status, {}, {}, [])


def _job(folder: Path) -> Job | None:
    """Returns the SLURM job that writes to the parent of a run directory, as slurm/lib.sh records it."""
    owner, log = folder.parent / "logs/owner", folder.parent / "logs/job.log"
    if not owner.is_file() or not log.is_file():
        return None
    job = owner.read_text().strip()
    lines = re.findall(rf"job {job}\.(\d+): (.*)", log.read_text(errors="replace"))
    state, reason = _queued(job)
    waits = WAITS.get(reason.strip("()"), reason.strip("()")) if state == "PENDING" else ""
    attempt, said = (int(lines[-1][0]) + 1, lines[-1][1]) if lines else (1, "")
    return Job(job, attempt, state, waits, "" if state == "PENDING" else reason, said)


def _queued(number: str) -> tuple[str, str]:
    """Returns state, and nodes or reason, of a job in SLURM's queue."""
    if not shutil.which("squeue"):
        return "", ""
    done = subprocess.run(["squeue", "-h", "-j", number, "-o", "%T|%R"], capture_output=True, text=True, check=False)
    state, _, reason = done.stdout.strip().partition("\n")[0].partition("|")
    return state, reason


def described(status: Status) -> str:
    """Returns several lines about one run."""
    run, steps = status.run, status.steps
    of = f", step {status.step} of {steps}" if steps else ""
    left = f", left {status.left}" if status.left else ""
    lines = [("", f"{status.name}: {status.state}{of}{left}")]
    if run is not None:
        values = {key: json.loads(value) for key, value in run.status.items()}
        lines += _of_run(status, run, values)
    if status.failure:
        lines.append(("failed", status.failure))
    if (job := status.job) is not None:
        where = f"waits for {job.waits}" if job.waits else f"{job.state or 'not in the queue'} {job.nodes}".strip()
        lines.append(("job", f"{job.number}, attempt {job.attempt}: {where}"))
        lines += [("", f"last message: {job.said}")] if job.said else []
        lines += [("", said)] if (said := _last_progress(status.folder.parent / "logs")) else []
    return "\n".join(lines[0][1:] + tuple(f"  {head:11s}{text}" for head, text in lines[1:]))


def _of_run(status: Status, run: Run, values: dict[str, Any]) -> list[tuple[str, str]]:
    lines, last = [], run.last(None)
    if status.seconds:
        speed = [f"{number(status.seconds)} s/step"]
        if is_number(last.get("tokens_per_second")):
            speed.append(f"{number(last['tokens_per_second'])} tok/s")
        if is_number(last.get("mfu")):
            speed.append(f"MFU {last['mfu']:.0%}")
        lines.append(("speed", ", ".join(speed)))
    for data in (None, *run.eval_sets):
        if shown := _metrics(run.last(data)):
            lines.append((data or "train", f"{shown} (step {run.last(data)['step']})"))
    if run.lines:
        texts = [line.get("message") or f"step {line['step']}: {line.get('reason', '')}" for line in run.alarms]
        lines.append(("alarms", f"{len(texts)}, the last: {texts[-1]}" if texts else "none"))
    if checkpoint := values.get("checkpoint"):
        lines.append(("checkpoint", str(checkpoint)))
    if (reason := values.get("reason")) and status.state in ("failed", "stopped", "waiting"):
        lines.append(("ended", f"code {values.get('code')}: {reason}"))
    if status.state == "running":
        silent = time.time() - max(_written(status.folder / name) for name in ("status.json", "metrics.jsonl"))
        quiet = f"; no new line for {duration(silent)}" if silent > SILENT else ""
        lines.append(("now", f"{values.get('phase', 'training')}{quiet}"))
    return lines


def _metrics(line: dict[str, Any]) -> str:
    forms = {"loss": "loss {:.3g}", "spo/chosen_shift": "chosen {:+.2f}", "rewards/accuracies": "acc {:.2f}"}
    return "  ".join(form.format(line[name]) for name, form in forms.items() if is_number(line.get(name)))


def _written(path: Path) -> float:
    return path.stat().st_mtime if path.is_file() else 0.0


def _last_progress(logs: Path) -> str:
    """Returns the last progress line of the newest log of a job's steps."""
    files = [logs / f"{name}.log" for name in ("reference", "train", "export", "evaluate")]
    newest = max(files, key=_written)
    if not newest.is_file():
        return ""
    with newest.open("rb") as file:
        file.seek(max(0, newest.stat().st_size - 20_000))
        lines = file.read().decode(errors="replace").splitlines()
    found = [line for line in lines if re.search(r"  left \d|  done in \d", line)]
    return re.sub(r"^ *\d+: ", "", found[-1]) if found else ""


def table(statuses: Sequence[Status]) -> str:
    """Returns one line per run, and a line that counts their states."""
    rows = []
    for one in statuses:
        steps = f"{one.step}/{one.steps}" if one.steps else ""
        alarms = str(len(one.run.alarms)) if one.run and one.run.alarms else ""
        what = one.failure or (f"waits for {one.job.waits}" if one.job and one.job.waits else "")
        if not what and one.state in ("failed", "stopped") and one.run:
            what = str(json.loads(one.run.status.get("reason", '""')))
        shown = _metrics(one.run.last(one.run.eval_sets[0] if one.run.eval_sets else None)) if one.run else ""
        rows.append([one.name, one.state, steps, one.left, alarms, shown, what[:100]])
    counts = Counter(one.state for one in statuses)
    states = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    header = ["run", "state", "step", "left", "alarms", "held-out or last batch", ""]
    body = tabulate(rows, header, tablefmt="plain", disable_numparse=True)
    return f"{body}\n{len(statuses)} runs: {states}"
