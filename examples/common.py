"""Functions that the examples share: run commands, one after another or in parallel, and read their output."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_spo.errors import UserError
from megatron_spo.subcommands import ending

LOG_TAIL = 15  # number of lines shown of a failed command's log
PENALTY = ("spo.schedule=penalty", "spo.lambda_unit=relative")


class StageFailed(Exception):
    """Raised if a stage cannot be run, or its output folder belongs to something else; the message is for the user."""


def parse_arguments(description: str, default_out: str, *files: str, jobs: bool = True) -> argparse.ArgumentParser:
    """Returns a parser with the options of all examples; `files` are names of positional paths.

    `jobs`: whether the example runs several trainings in parallel.
    """
    parser = argparse.ArgumentParser(description=description)
    for file in files:
        parser.add_argument(file, type=Path)
    parser.add_argument("--out", type=Path, default=Path(default_out), help="folder to write [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="seed of problems, weights and sampling [%(default)s]")
    if jobs:
        parser.add_argument("--jobs", type=int, default=2, help="runs in parallel, one core each [%(default)s]")
    parser.add_argument("--fresh", action="store_true", help="delete OUT and start over instead of resuming")
    return parser


def variants(losses: Mapping[str, Sequence[str]], spo_lambda: float) -> dict[str, list[str]]:
    """Returns run name -> overrides: the control, then every loss alone and with SPO at the same `spo.lambda`."""
    found = {"sft_on_chosen": ["spo.schedule=sft"]}
    for name, parameters in losses.items():
        chosen = [f"loss.name={name}", *parameters]
        found[name] = [*chosen, "spo.schedule=none"]
        found[f"{name}+spo"] = [*chosen, *PENALTY, f"spo.lambda={spo_lambda}"]
    return found


class TrainingScale(Protocol):
    """Training lengths of an example, in optimizer steps: SFT, and a run on the pairs."""

    @property
    def sft_steps(self) -> int: ...
    @property
    def sft_warmup(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def warmup(self) -> int: ...
    @property
    def eval_every(self) -> int: ...


@dataclass
class Stages:
    """Runs commands in a folder, and skips those whose output exists."""

    out: Path
    jobs: int
    threads: int = 1  # CPU threads of a process
    started: float = field(default_factory=time.perf_counter)
    _printing: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, out: Path, jobs: int, settings: Mapping[str, Any], *, fresh: bool, threads: int = 1) -> "Stages":
        """Creates the folder or resumes in it; raises StageFailed if it has other content or other settings."""
        record = out / "settings.json"
        if out.exists() and any(out.iterdir()) and not record.is_file():
            raise StageFailed(f"{out} exists and was not written by this example; choose another --out")
        if record.is_file() and fresh:
            shutil.rmtree(out)
        if record.is_file() and (there := json.loads(record.read_text())) != dict(settings):
            raise StageFailed(f"{out} was written with other settings ({there}); use --fresh, or another --out")
        (out / "logs").mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps(dict(settings)))
        return cls(out, jobs, threads)

    def file(self, name: str) -> Path:
        """Returns OUT/NAME.jsonl, a file that one stage writes and another reads."""
        return self.out / f"{name}.jsonl"

    def say(self, text: str) -> None:
        """Prints a line with the time since the start."""
        with self._printing:
            print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", flush=True)

    def command(self, name: str, *arguments: str | Path, done: bool, processes: int = 1) -> None:
        """Runs `python -m megatron_spo ARGUMENTS` unless `done`.

        Output goes to logs/NAME.log. Several data-parallel processes are started by torchrun.

        Raises:
            StageFailed: If the command fails; the message has the end of its log.
        """
        if done:
            self.say(f"{name}: already done")
            return
        log = self.out / "logs" / f"{name}.log"
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        launcher = several if processes > 1 else []
        command = [sys.executable, *launcher, "-m", "megatron_spo", *map(str, arguments)]
        begin = time.perf_counter()
        with log.open("w") as file:
            print("$", " ".join(command), file=file, flush=True)
            environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
        if code != 0:
            raise StageFailed(f"{name} {ending(code)}; from {log}:\n{reason(log)}")
        self.say(f"{name}: {time.perf_counter() - begin:.1f} s")

    def train(self, name: str, config: Path, overrides: Sequence[str], *, processes: int = 1) -> Path:
        """Trains into OUT/NAME; returns that run directory."""
        run = self.out / name
        options = [f"output={run}", f"training.threads={self.threads}", *overrides]
        finished = run_state(run) == "done"
        self.command(f"train-{name}", "train", config, *options, done=finished, processes=processes)
        return run

    def export(self, name: str) -> Path:
        """Exports the run OUT/NAME; returns the folder in Hugging Face format."""
        model = self.out / f"{name}-hf"
        self.command(f"convert-{name}", "convert", self.out / name, model, "--to", "hf", done=model.is_dir())
        return model

    def train_sft(self, config: Path, scale: TrainingScale, seed: int) -> Path:
        """Trains the model in OUT/model on OUT/sft.jsonl with `jobs` processes; returns the exported model."""
        overrides = [
            f"model.path={self.out / 'model'}",
            f"data.train={self.file('sft')}",
            f"training.steps={scale.sft_steps}",
            f"optimizer.warmup_steps={scale.sft_warmup}",
            f"training.seed={seed}",
        ]
        self.train("sft", config, overrides, processes=self.jobs)
        return self.export("sft")

    def fill_reference(self, config: Path, scale: TrainingScale, seed: int, model: Path) -> list[str]:
        """Fills the reference cache of OUT/pairs.jsonl and OUT/pairs_heldout.jsonl; returns overrides for all runs."""
        shared = [
            f"model.path={model}",
            f"data.train={self.file('pairs')}",
            f"data.eval={self.file('pairs_heldout')}",
            f"reference.cache={self.out / 'reference'}",
            f"training.steps={scale.steps}",
            f"optimizer.warmup_steps={scale.warmup}",
            f"training.eval_every={scale.eval_every}",
            f"training.seed={seed}",
        ]
        output = f"output={self.out / 'reference-run'}"
        self.command("reference", "reference", config, output, *shared, done=False, processes=self.jobs)
        return shared

    def generate(self, name: str, model: Path, prompts: Path, *options: str) -> Path:
        """Writes responses of an exported model to OUT/NAME.jsonl; returns that file."""
        written = self.file(name)
        files = ("--prompts", prompts, "--out", written)
        self.command(f"generate-{name}", "generate", model, *files, *options, done=written.is_file())
        return written

    def side_by_side(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Runs the tasks, `jobs` at a time; after a failure, no further task is started."""
        failed = threading.Event()

        def guarded(task: Callable[[], None]) -> None:
            if failed.is_set():
                return
            try:
                task()
            except BaseException:
                failed.set()
                raise

        with ThreadPoolExecutor(self.jobs) as pool:
            for future in [pool.submit(guarded, task) for task in tasks]:
                future.result()


def run_main(main: Callable[[], None]) -> None:
    """Runs an example's main function; a failed stage ends the program with its message and exit code 1."""
    try:
        main()
    except (StageFailed, UserError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again to resume")


def reason(log: Path) -> str:
    """Returns why a command failed: its log from the error message on, or the last lines without one."""
    lines = log.read_text().splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("error:")), len(lines) - LOG_TAIL)
    return "\n".join(lines[max(first, 0) :][:LOG_TAIL])


def run_state(run: Path) -> str | None:
    """Returns the `state` of a run directory, or None if there is no run."""
    status = run / "status.json"
    return json.loads(status.read_text())["state"] if status.is_file() else None


def metrics_lines(run: Path, kind: str) -> list[dict[str, Any]]:
    """Returns the lines of one kind (train, eval) of a run's metrics.jsonl."""
    return [line for line in read_jsonl(run / "metrics.jsonl") if line["kind"] == kind]


def training_seconds(run: Path) -> float:
    """Returns the seconds spent in optimizer steps."""
    return float(sum(line["seconds"] for line in metrics_lines(run, "train")))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as JSONL, atomically."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table for the terminal, the first column aligned left and the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row))
        for row in [header, *rows]
    ]
    return "\n".join(lines)
