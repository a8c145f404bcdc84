"""Reads run directories: metrics.jsonl, config.yaml, status.json, and what else a run may have written."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spo.config.yaml_text import parse_yaml
from megatron_spo.errors import UserError

Points = list[tuple[int, float]]
APART = ("output", "training.seed")
"""The keys in which runs of one group may differ."""


@dataclass(frozen=True)
class Run:
    """One run; what it did not write is empty.

    Attributes:
        lines: of metrics.jsonl.
        config: flat keys such as `loss.beta`, values as JSON text.
        status, provenance: status.json and provenance.json, flat.
        held_out: by the data set's name, its pairs at the last evaluation: {"step", "pairs", "worst"}.
        samples: lines of samples.jsonl.
    """

    lines: list[dict[str, Any]]
    config: dict[str, str]
    status: dict[str, str]
    provenance: dict[str, str]
    held_out: dict[str, dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def state(self) -> str:
        """As status.json says."""
        return self.status.get("state", '"unknown"').strip('"')

    @property
    def group(self) -> tuple[tuple[str, str], ...]:
        """Equal for runs that differ in their seed alone; () where the configuration is not known."""
        return tuple(sorted((key, value) for key, value in self.config.items() if key not in APART))

    @property
    def eval_sets(self) -> list[str]:
        """Names of the held-out sets, in the order of their first evaluation."""
        return list(dict.fromkeys(line["name"] for line in self.of_kind("eval")))

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """Alarm lines."""
        return self.of_kind("alarm")

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The lines of a kind."""
        return [line for line in self.lines if line["kind"] == kind]

    def of(self, data: str | None) -> list[dict[str, Any]]:
        """The lines of a held-out set, or of training (None)."""
        return [line for line in self.of_kind("train" if data is None else "eval") if line.get("name") == data]

    def points(self, metric: str, data: str | None) -> Points:
        """(step, value) of a metric on a held-out set, or in training (None); only finite values."""
        return finite_points(self.of(data), metric)

    def last(self, data: str | None) -> dict[str, Any]:
        """The last line of a held-out set, or of training (None)."""
        return (self.of(data) or [{"step": 0}])[-1]


def finite_points(lines: Sequence[Mapping[str, Any]], metric: str) -> Points:
    """(step, value) of a metric, where a line has it and it is finite."""
    return [(line["step"], line[metric]) for line in lines if is_number(line.get(metric))]


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


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
    return Run(
        lines=_read_lines(folder / "metrics.jsonl", "metrics line", ("kind", "step")),
        config=flatten(_read_whole(folder / "config.yaml", parse_yaml)),
        status=flatten(_read_whole(folder / "status.json", json.loads)),
        provenance=flatten(_read_whole(folder / "provenance.json", json.loads)),
        held_out={path.stem: _read_pairs(path) for path in sorted((folder / "held_out").glob("*.json"))},
        samples=_read_lines(folder / "samples.jsonl", "sample", ("step", "data", "prompt", "answer")),
    )


def _read_whole(path: Path, parse: Any) -> Any:
    try:
        found = parse(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it must hold keys and values")
    return found


def _read_pairs(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = _read_whole(path, json.loads)
    pairs, worst = found.get("pairs"), found.get("worst", [])
    wanted = ("chosen_shift", "rejected_shift")
    for rows in (pairs, worst):
        if not isinstance(rows, list) or not all(isinstance(row, dict) and set(wanted) <= set(row) for row in rows):
            raise UserError(f"{path} is damaged: `pairs` and `worst` must be lists of rows with {' and '.join(wanted)}")
    return {"step": found.get("step"), "pairs": pairs, "worst": worst}


def _read_lines(path: Path, what: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of a file, each with the keys (of an evaluation a name, too); an unfinished last one (a run still
    writing, or killed) is left out."""
    lines = []
    for number, text in enumerate(_lines_of(path), 1):
        try:
            line = json.loads(text)
            wanted = (*keys, "name") if line.get("kind") == "eval" else keys
            lines.append({**{key: line[key] for key in wanted}, **line})
        except (ValueError, KeyError, AttributeError) as error:
            if not text.endswith("\n"):
                break
            raise UserError(f"{path} line {number}: not a {what} ({error})") from error
    return lines


def _lines_of(path: Path) -> list[str]:
    """Lines as written: splitlines would also split at separators that JSON leaves as they are within a text."""
    if not path.is_file():
        return []
    try:
        *whole, rest = path.read_text(encoding="utf-8").split("\n")
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from error
    return [line + "\n" for line in whole] + ([rest] if rest else [])


def flatten(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as one with dotted keys and values as JSON text."""
    if not isinstance(values, dict):
        return {prefix: json.dumps(values, ensure_ascii=False)}
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
