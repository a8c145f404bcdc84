"""Runs the stages of all rounds that are not done, and writes the table and the report."""

import contextlib
import fcntl
import json
import logging
import random
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_spo.data.json_lines import read_rows, write_rows
from megatron_spo.errors import LostRank, StageFailed, Stopped, UserError
from megatron_spo.files import write_whole
from megatron_spo.rounds.record import check_record
from megatron_spo.rounds.spec import Rounds
from megatron_spo.rounds.stages import Stage, groups_of, prompts_of, status
from megatron_spo.subcommands import OURS, STOPPED, Subcommands, ending, reason

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """How the commands are started; the words replace `python -m megatron_spo`.

    Attributes:
        one: For a command of one process.
        shared: For training and reference pass.
        at_once: Number of commands of one group that run at the same time.
    """

    one: Sequence[str] = tuple(OURS)
    shared: Sequence[str] = tuple(OURS)
    at_once: int = 1


def launch_of(processes: int, shared: str | None, one: str | None, at_once: int) -> Launch:
    """Returns how the commands are started, from the options of the command.

    Raises:
        UserError: an option is invalid.
    """
    for name, value in (("--processes", processes), ("--at-once", at_once)):
        if value < 1:
            raise UserError(f"rounds: {name} is {value}; must be at least 1")
    if shared is not None and processes > 1:
        raise UserError("rounds: --processes and --launch exclude each other; remove one of them")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    several = OURS if processes == 1 else [sys.executable, *torchrun, "-m", "megatron_spo"]
    return Launch(OURS if one is None else _words(one, "--launch-one"),
                  several if shared is None else _words(shared, "--launch"), at_once)  # fmt: skip


def _words(text: str, option: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"rounds: {option} {text!r} cannot be split into words ({error})") from None
    if not words:
        raise UserError(f"rounds: {option} is empty; remove it, or give the words that start a command")
    return words


def run_rounds(rounds: Rounds, launch: Launch) -> None:
    """Runs all stages that are not done.

    Raises:
        UserError: a setting has changed since an earlier call, there are too few prompts, or another call is running.
        StageFailed: a command failed.
        LostRank: a command was killed.
        Stopped: a signal requested the stop.
    """
    rounds.out.mkdir(parents=True, exist_ok=True)
    with _alone(rounds.out):
        check_record(rounds)
        rows = read_prompts(rounds)
        runner = _Runner(launch)
        with runner.forwarding_signals():
            for number in range(rounds.spec.rounds + 1):
                if number:
                    write_prompts(rounds, number, rows)
                for group in groups_of(rounds, number):
                    runner.run(number, group)


def read_prompts(rounds: Rounds) -> list[dict[str, Any]]:
    """Returns the rows of the prompts, in random order if each round has its own.

    Raises:
        UserError: a row is invalid, or there are too few.
    """
    rows = [row for _, row in read_rows(Path(rounds.spec.prompts))]
    size, count, parts = rounds.spec.prompts_per_round, rounds.spec.rounds, rounds.spec.sampling.parts
    if size is not None:
        if size * count > len(rows):
            raise UserError(f"{rounds.path}: {count} rounds of prompts_per_round = {size} need {size * count} prompts, "
                            f"but {rounds.spec.prompts} has {len(rows)}; lower one of them, or remove "
                            "prompts_per_round to use all prompts in every round")  # fmt: skip
        random.Random(f"prompts {rounds.spec.seed}").shuffle(rows)  # independent of the number of rounds
    if (here := size or len(rows)) < parts:
        raise UserError(f"{rounds.path}: sampling.parts = {parts} exceeds the {here} prompts of a round; lower it")
    return rows


def write_prompts(rounds: Rounds, number: int, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the prompts of a round, unless they are there."""
    size = rounds.spec.prompts_per_round
    own = rows if size is None else rows[size * (number - 1) : size * number]
    files = prompts_of(rounds, number)
    for part, file in enumerate(files):
        if not file.is_file():
            write_rows(file, own[part :: len(files)])


@dataclass
class _Runner:
    launch: Launch
    commands: Subcommands = field(default_factory=Subcommands)
    signal: int = signal.SIGTERM
    failed: threading.Event = field(default_factory=threading.Event)

    def run(self, number: int, group: Sequence[Stage]) -> None:
        """Runs the stages of a group, `at_once` at a time; raises the error of the first that failed."""
        if all(stage.is_done for stage in group):
            return
        with ThreadPoolExecutor(self.launch.at_once) as pool:
            for one in [pool.submit(self._stage, number, stage) for stage in group]:
                one.result()

    def _stage(self, number: int, stage: Stage) -> None:
        if self.failed.is_set():
            return
        stage.folder.mkdir(parents=True, exist_ok=True)
        with self.commands.held(stage.folder / f".{stage.name}.lock") as lock:
            if not self.commands.stopping.is_set() and not stage.is_done:
                LOG.info(f"round {number}, {stage.name}: megatron-spo {stage.words[0]}, log in {stage.log}")
                before = status(stage.made) if stage.name == "train" and stage.made else {}
                begin = time.monotonic()
                code = self.commands.call([*(self.launch.shared if stage.shared else self.launch.one), *stage.words],
                                          stage.log, lock)  # fmt: skip
                if code == 0:
                    write_whole(stage.mark, json.dumps({"seconds": round(time.monotonic() - begin, 2)}))
                    return
                code = self._meaning(stage, code, before)
                self.failed.set()  # no other stage of the group is started
                if not self.commands.stopping.is_set():
                    raise _failure(f"{stage.name} of round {number}", code, stage)
        if self.commands.stopping.is_set():
            raise Stopped(f"{signal.Signals(self.signal).name} in round {number}, {stage.name}")

    def _meaning(self, stage: Stage, code: int, before: dict[str, object]) -> int:
        """Returns the exit code of `megatron-spo`: launchers return their own, but status.json has that of `train`."""
        if stage.name != "train" or stage.made is None or code < 0 or code in (2, 3, 4, 5, STOPPED):
            return code
        now = status(stage.made)
        if now.get("state") in ("running", "done"):
            return LostRank.code  # no process was left to write it
        return int(now.get("code", code)) if now != before else code

    @contextlib.contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """Forwards SIGTERM, SIGINT and SIGUSR1 to the running commands, which then save and end."""

        def forward(number: int, frame: FrameType | None) -> None:
            self.signal = number
            self.commands.stop(signal.SIGTERM if number == signal.SIGINT else number)

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        before = {number: signal.signal(number, forward) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _failure(where: str, code: int, stage: Stage) -> BaseException:
    why = f"{reason(stage.log)} (log: {stage.log})"
    if code == STOPPED:
        return Stopped(f"{where}: {why}")
    if code < 0 or code > 128 or code == LostRank.code:
        how = "lost a process" if code == LostRank.code else ending(code)
        return LostRank(f"{where} {how}; the same command resumes. Last line: {why}")
    return StageFailed(f"{where} {ending(code)}: {why}; the same command resumes from there", code)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    with (out / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out} is in use by another `megatron-spo rounds`; wait for it, or end it") from None
        yield
