"""The files of a run: the only interface between a run and whoever looks at it, and the sinks that get the same."""

import contextlib
import errno
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_spo.errors import Stopped, UserError
from megatron_spo.files import write_whole
from megatron_spo.train.sinks import Sinks

LOG = logging.getLogger(__name__)

SAMPLES = "samples.jsonl"
MEASURED_AFTER = ("eval", "generation", None)
"""Kinds of the lines of an evaluation, beside the alarms on its sets; those of samples.jsonl have none."""


class RunDirectory:
    """Writes config.yaml, status.json, metrics.jsonl, samples.jsonl, dropped_rows.jsonl and held_out/; silent on ranks
    that are not main.

    `sinks` get every line of metrics.jsonl and the tables, too.
    """

    def __init__(self, path: Path, *, is_main: bool) -> None:
        self.path, self.is_main = path, is_main
        self.checkpoints, self.sinks = path / "checkpoints", Sinks()
        self._status: dict[str, Any] = {"step": 0}
        self._kept: dict[str, str] = {}
        self._metrics: Path | None = None
        self._unwritten = ""

    def make(self) -> None:
        """Make the folder; on the main process."""
        self.path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, text: str, *, anyway: bool = False) -> None:
        """Replace a file as a whole; `anyway`: also where this process is not main."""
        if self.is_main or anyway:
            write_whole(self.path / name, text)

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Replace a file as a whole by a JSON object."""
        self.write(name, json.dumps(values, indent=1))

    def write_kept(self, name: str, text: str) -> None:
        """Write a file that `restore` brings back."""
        self._kept[name] = text
        self.write(name, text)

    def restore(self) -> None:
        """Make the folder again, with what describes the run, where someone has removed it."""
        for name, text in self._kept.items():
            if self.is_main and not (self.path / name).exists():
                with self.tolerated(name):
                    self.path.mkdir(parents=True, exist_ok=True)
                    self.write(name, text)

    def status(self, state: str, step: int, **more: Any) -> None:
        """Replace status.json: state is running or done; what `more` held before is kept."""
        self._status = {**self._status, "state": state, "step": step, **more}
        with self.tolerated("status.json"):
            self.write_json("status.json", self._status)

    def ended(self, code: int, reason: str, *, anyway: bool = False) -> None:
        """Status.json at an end before the last step: stopped (the same command goes on) or failed, code and reason."""
        stopped = code == Stopped.code or code > 128
        end = {"state": "stopped" if stopped else "failed", "code": code, "reason": reason}
        self.write("status.json", json.dumps({**self._status, **end}, indent=1), anyway=anyway)

    @property
    def last_checkpoint(self) -> str | None:
        """The newest one that status.json names."""
        return self._status.get("checkpoint")

    def open_metrics(self, *, after_step: int, owed: Sequence[str] = ()) -> None:
        """Open metrics.jsonl and samples.jsonl for appending; lines of what will be done again are cut off, as is a
        torn one: after step 0 all. `owed`: the held-out sets that will be evaluated once more after this step."""
        if not self.is_main:
            return
        for name in ("metrics.jsonl", SAMPLES):
            kept = []
            path = self.path / name
            for text in path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []:
                try:
                    line = json.loads(text)
                    measured = line.get("kind") in MEASURED_AFTER or line.get("data") in owed
                    again = after_step == 0 or line["step"] > after_step
                    again = again or (owed and measured and line["step"] == after_step)
                except (ValueError, KeyError, TypeError):  # torn when the process was killed
                    continue
                if not again:
                    kept.append(text.rstrip("\n") + "\n")
            if path.exists() or name != SAMPLES:
                self.write(name, "".join(kept))
        self._metrics = self.path / "metrics.jsonl"

    def log(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; what cannot be written now is written with a later line."""
        if self._metrics is None:
            return
        self.sinks.line(kind, step, metrics)
        self._unwritten += json.dumps({"kind": kind, "step": step, **metrics}) + "\n"
        with self.tolerated("metrics.jsonl"):
            _append_all(self._metrics, self._unwritten.encode())
            self._unwritten = ""

    def log_samples(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows {"step", "data", ...} to samples.jsonl, and hand them to the sinks as the table `name`."""
        if self._metrics is not None:
            self.sinks.table(name, step, rows)
            with self.tolerated(SAMPLES):
                _append_all(self.path / SAMPLES, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def write_held_out(self, data: str, content: Mapping[str, Any]) -> None:
        """Replace held_out/<data>.json; the worst pairs go to the sinks, too."""
        if self._metrics is not None:
            if content["worst"]:
                self.sinks.table(f"worst pairs/{data}", content["step"], content["worst"])
            with self.tolerated(f"held_out/{data}.json"):
                (self.path / "held_out").mkdir(exist_ok=True)
                self.write(f"held_out/{data}.json", json.dumps(content))

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace a JSONL file."""
        self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    @contextlib.contextmanager
    def tolerated(self, name: str) -> Iterator[None]:
        """A full disk or a vanished folder must not end a training whose weights are in memory."""
        try:
            yield
        except (OSError, UserError) as error:
            LOG.warning(f"{self.path / name} cannot be written now: {error}")


def _append_all(path: Path, content: bytes) -> None:
    """Append all of it or nothing."""
    with path.open("ab", buffering=0) as file:
        begin = file.tell()
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(begin)
            raise
