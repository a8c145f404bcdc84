"""The files of a run directory, and the sinks that receive the same lines. Readers of a run use only these files."""

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
"""Kinds of the lines that an evaluation writes, besides alarms on its sets; lines of samples.jsonl have no kind."""


class RunDirectory:
    """Writes config.yaml, status.json, metrics.jsonl, samples.jsonl, dropped_rows.jsonl and held_out/. Only the main
    process writes.

    `sinks` also get every line of metrics.jsonl and the tables.
    """

    def __init__(self, path: Path, *, is_main: bool) -> None:
        self.path, self.is_main = path, is_main
        self.checkpoints, self.sinks = path / "checkpoints", Sinks()
        self._status: dict[str, Any] = {"step": 0}
        self._kept: dict[str, str] = {}
        self._metrics: Path | None = None
        self._unwritten = ""

    def make(self) -> None:
        """Creates the folder, on the main process."""
        self.path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, text: str, *, anyway: bool = False) -> None:
        """Replaces a file atomically; `anyway`: also on processes other than the main one."""
        if self.is_main or anyway:
            write_whole(self.path / name, text)

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Replaces a file atomically with a JSON object."""
        self.write(name, json.dumps(values, indent=1))

    def write_kept(self, name: str, text: str) -> None:
        """Writes a file that `restore` can write again."""
        self._kept[name] = text
        self.write(name, text)

    def restore(self) -> None:
        """Creates the folder again, with the files that describe the run, if it was removed."""
        for name, text in self._kept.items():
            if self.is_main and not (self.path / name).exists():
                with self.tolerated(name):
                    self.path.mkdir(parents=True, exist_ok=True)
                    self.write(name, text)

    def status(self, state: str, step: int, **more: Any) -> None:
        """Replaces status.json; `state` is "running" or "done". Earlier values of `more` are kept."""
        self._status = {**self._status, "state": state, "step": step, **more}
        with self.tolerated("status.json"):
            self.write_json("status.json", self._status)

    def phase(self, label: str) -> None:
        """Writes into status.json what the run does now."""
        self._status["phase"] = label
        if self._status.get("state") == "running":
            self.status("running", self._status["step"])

    def ended(self, code: int, reason: str, *, anyway: bool = False) -> None:
        """Writes status.json if the run ends before its last step: state "stopped" (the same command resumes) or
        "failed", exit code and reason."""
        stopped = code == Stopped.code or code > 128
        end = {"state": "stopped" if stopped else "failed", "code": code, "reason": reason}
        self.write("status.json", json.dumps({**self._status, **end}, indent=1), anyway=anyway)

    @property
    def last_checkpoint(self) -> str | None:
        """Returns the name of the newest checkpoint according to status.json."""
        return self._status.get("checkpoint")

    def open_metrics(self, *, after_step: int, pending: Sequence[str] = ()) -> None:
        """Opens metrics.jsonl and samples.jsonl for appending. Removes incomplete lines and all lines that the run will
        write again: those after `after_step` (all of them for 0), and those of the evaluation after that step on the
        held-out sets `pending`."""
        if not self.is_main:
            return
        for name in ("metrics.jsonl", SAMPLES):
            kept = []
            path = self.path / name
            for text in path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []:
                try:
                    line = json.loads(text)
                    measured = line.get("kind") in MEASURED_AFTER or line.get("data") in pending
                    again = after_step == 0 or line["step"] > after_step
                    again = again or (pending and measured and line["step"] == after_step)
                except (ValueError, KeyError, TypeError):  # incomplete because the process was killed
                    continue
                if not again:
                    kept.append(text.rstrip("\n") + "\n")
            if path.exists() or name != SAMPLES:
                self.write(name, "".join(kept))
        self._metrics = self.path / "metrics.jsonl"

    def log(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl; if it cannot be written now, it is written with a later line."""
        if self._metrics is None:
            return
        self.sinks.line(kind, step, metrics)
        self._unwritten += json.dumps({"kind": kind, "step": step, **metrics}) + "\n"
        with self.tolerated("metrics.jsonl"):
            _append_all(self._metrics, self._unwritten.encode())
            self._unwritten = ""

    def log_samples(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows {"step", "data", ...} to samples.jsonl and passes them to the sinks as the table `name`."""
        if self._metrics is not None:
            self.sinks.table(name, step, rows)
            with self.tolerated(SAMPLES):
                _append_all(self.path / SAMPLES, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def write_held_out(self, data: str, content: Mapping[str, Any]) -> None:
        """Replaces held_out/<data>.json and passes the worst pairs to the sinks."""
        if self._metrics is not None:
            if content["worst"]:
                self.sinks.table(f"worst pairs/{data}", content["step"], content["worst"])
            with self.tolerated(f"held_out/{data}.json"):
                (self.path / "held_out").mkdir(exist_ok=True)
                self.write(f"held_out/{data}.json", json.dumps(content))

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replaces a JSONL file."""
        self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    @contextlib.contextmanager
    def tolerated(self, name: str) -> Iterator[None]:
        """Turns an OSError into a warning: a full disk or a missing folder must not end a run whose weights are in
        memory."""
        try:
            yield
        except (OSError, UserError) as error:
            LOG.warning(f"{self.path / name} cannot be written now: {error}")


def _append_all(path: Path, content: bytes) -> None:
    """Appends all of `content`, or nothing if that fails."""
    with path.open("ab", buffering=0) as file:
        begin = file.tell()
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(begin)
            raise
