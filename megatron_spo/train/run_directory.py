"""The files of a run: the only interface between a run and whoever looks at it."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO


class RunDirectory:
    """Writes config.yaml, status.json, metrics.jsonl and dropped_rows.jsonl; silent on ranks that are not main."""

    def __init__(self, path: Path, *, is_main: bool) -> None:
        self.path, self.is_main = path, is_main
        self.checkpoints = path / "checkpoints"
        self._metrics: TextIO | None = None
        if is_main:
            path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, text: str) -> None:
        """Replace a file as a whole."""
        if self.is_main:
            new = self.path / f".{name}.new"
            new.write_text(text)
            os.replace(new, self.path / name)

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Replace a file as a whole by a JSON object."""
        self.write(name, json.dumps(values, indent=1))

    def status(self, state: str, step: int, **more: Any) -> None:
        """Replace status.json: state is running, done, or failed (with a `reason`)."""
        self.write_json("status.json", {"state": state, "step": step, **more})

    def open_metrics(self, *, after_step: int) -> None:
        """Open metrics.jsonl for appending; lines of steps that will be done again are cut off."""
        if not self.is_main:
            return
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= after_step]
        self.write("metrics.jsonl", "".join(line + "\n" for line in kept))
        self._metrics = path.open("a")

    def log(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.write(json.dumps({"kind": kind, "step": step, **metrics}) + "\n")
            self._metrics.flush()

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace a JSONL file."""
        self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def close(self) -> None:
        """Close metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.close()
