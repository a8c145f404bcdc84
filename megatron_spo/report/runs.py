"""Reads run directories: metrics.jsonl, config.yaml, status.json."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spo.config.yaml_text import parse_yaml
from megatron_spo.errors import UserError

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """One run: its metrics lines, its configuration with flat keys such as `loss.beta`, and its state."""

    lines: list[dict[str, Any]]
    config: dict[str, str]
    state: str

    @property
    def eval_sets(self) -> list[str]:
        """Names of the held-out sets, in the order of their first evaluation."""
        return list(dict.fromkeys(line["name"] for line in self.lines if line["kind"] == "eval"))

    def of(self, data: str | None) -> list[dict[str, Any]]:
        """The lines of a held-out set, or of training (None)."""
        kind = "train" if data is None else "eval"
        return [line for line in self.lines if line["kind"] == kind and line.get("name") == data]

    def points(self, metric: str, data: str | None) -> Points:
        """(step, value) of a metric on a held-out set, or in training (None)."""
        return [(line["step"], line[metric]) for line in self.of(data) if line.get(metric) is not None]

    def last(self, data: str | None) -> dict[str, Any]:
        """The last line of a held-out set, or of training (None)."""
        return (self.of(data) or [{"step": 0}])[-1]


def read_runs(folders: Sequence[Path]) -> dict[str, Run]:
    """Runs by name: the folder's name, or the path where names would repeat."""
    names = [folder.resolve().name for folder in folders]
    unique = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    return {name: read_run(folder) for name, folder in zip(unique, folders, strict=True)}


def read_run(folder: Path) -> Run:
    """One run directory; UserError names the file that is missing or unreadable."""
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(
            f"{folder} is not a run directory: it has no metrics.jsonl; name a directory that `train` wrote"
        )
    config, status = folder / "config.yaml", folder / "status.json"
    try:
        flat = flatten(parse_yaml(config.read_text())) if config.is_file() else {}
        state = json.loads(status.read_text())["state"] if status.is_file() else "unknown"
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder}: config.yaml or status.json is damaged ({error})") from error
    return Run(read_metrics(folder / "metrics.jsonl"), flat, state)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; an unfinished last line (a run still writing, or killed) is left out."""
    lines = []
    for number, text in enumerate(path.read_text().splitlines(keepends=True), 1):
        try:
            line = json.loads(text)
            lines.append({"kind": line["kind"], "step": line["step"], **line})
        except (ValueError, KeyError, TypeError) as error:
            if not text.endswith("\n"):
                break
            raise UserError(f"{path} line {number}: not a metrics line ({error})") from error
    return lines


def flatten(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as one with dotted keys and values as text."""
    if not isinstance(values, dict):
        return {prefix: json.dumps(values)}
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
