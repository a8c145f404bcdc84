"""Reads run directories: metrics.jsonl, config.yaml, status.json and the optional files."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spo.config.yaml_text import parse_yaml
from megatron_spo.errors import UserError

Points = list[tuple[int, float]]
APART = ("output", "training.seed")
"""Keys in which runs of one group may differ."""
NOT_NAMING = (*APART, "reference.cache")
"""Keys that do not tell what a run is about."""
ALONE = ("loss.name", "spo.schedule", "model.path", "data.train")
"""Keys whose values are clear without the key."""
LONGEST_NAME = 60
"""Most characters of a name made from keys."""


@dataclass(frozen=True)
class Run:
    """One run; attributes are empty if the run did not write the file.

    Attributes:
        lines: Lines of metrics.jsonl.
        config: Flat keys such as `loss.beta`, values as JSON text.
        status: status.json, flat.
        provenance: provenance.json, flat.
        held_out: Pairs of each held-out set at the last evaluation: {"step", "pairs", "worst"}.
        samples: Lines of samples.jsonl.
    """

    lines: list[dict[str, Any]]
    config: dict[str, str]
    status: dict[str, str]
    provenance: dict[str, str]
    held_out: dict[str, dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def state(self) -> str:
        """The state in status.json, or "unknown"."""
        return self.status.get("state", '"unknown"').strip('"')

    @property
    def group(self) -> tuple[tuple[str, str], ...]:
        """A key that is equal for runs that differ only in their seed; () if there is no configuration."""
        return tuple(sorted((key, value) for key, value in self.config.items() if key not in APART))

    @property
    def eval_sets(self) -> list[str]:
        """Names of the held-out sets, in the order of their first evaluation."""
        return list(dict.fromkeys(line["name"] for line in self.of_kind("eval")))

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """The alarm lines."""
        return self.of_kind("alarm")

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Returns the lines of a kind."""
        return [line for line in self.lines if line["kind"] == kind]

    def of(self, data: str | None) -> list[dict[str, Any]]:
        """Returns the lines of a held-out set, or of training (None)."""
        return [line for line in self.of_kind("train" if data is None else "eval") if line.get("name") == data]

    def points(self, metric: str, data: str | None) -> Points:
        """Returns the finite (step, value) of a metric on a held-out set, or in training (None)."""
        return finite_points(self.of(data), metric)

    def last(self, data: str | None) -> dict[str, Any]:
        """Returns the last line of a held-out set, or of training (None)."""
        return (self.of(data) or [{"step": 0}])[-1]


def finite_points(lines: Sequence[Mapping[str, Any]], metric: str) -> Points:
    """Returns (step, value) of every line with a finite value of the metric."""
    return [(line["step"], line[metric]) for line in lines if is_number(line.get(metric))]


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_runs(folders: Sequence[Path]) -> dict[str, Run]:
    """Reads runs; returns them by name, in natural order ("run2" before "run10").

    The name is that of the folder. If names would repeat, as in a study, it is made from the keys in which the runs
    differ, or else from the part of the path that differs.
    """
    distinct = list(dict.fromkeys(folder.resolve() for folder in folders))
    runs = [read_run(folder) for folder in distinct]
    candidates = [folder.name for folder in distinct], _by_keys(runs), _by_path(distinct)
    names = next(names for names in candidates if len(set(names)) == len(runs))
    return dict(sorted(zip(names, runs, strict=True), key=lambda named: natural(named[0])))


def natural(name: str) -> list[tuple[float, str]]:
    """Returns a key that sorts numbers within names by their value."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", name)
    return [(float(part), "") if i % 2 else (-1.0, part) for i, part in enumerate(parts)]


def _by_keys(runs: Sequence[Run]) -> list[str]:
    """Returns names made from what differs between the runs, such as "simpo, lr 1e-6"; "" for all if they are long."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config if key not in NOT_NAMING))
    differing = [key for key in keys if len({run.config.get(key) for run in runs}) > 1]
    if len({run.group for run in runs}) < len(runs):
        differing.append("training.seed")
    names = [", ".join(_named(key, run.config[key]) for key in differing if key in run.config) for run in runs]
    return names if all(0 < len(name) <= LONGEST_NAME for name in names) else [""] * len(runs)


def _named(key: str, value: str) -> str:
    text = label(json.loads(value))
    return text if key in ALONE else f"{key.rpartition('.')[2]} {text}"


def label(value: Any) -> str:
    """Returns a value of a configuration as short text: of a path its name, of several values each."""
    if isinstance(value, dict):
        return label(value.get("path", json.dumps(value)))
    if isinstance(value, list):
        return "+".join(label(one) for one in value)
    if isinstance(value, str):
        return value.rstrip("/").rpartition("/")[2] or value
    if is_number(value) and not isinstance(value, bool):
        return f"{value:g}".replace("e-0", "e-").replace("e+0", "e+")  # 1e-6
    return json.dumps(value)


def _by_path(folders: Sequence[Path]) -> list[str]:
    """Returns paths without the first and last parts that all have in common."""
    parts = [list(folder.parts) for folder in folders]
    for end in (0, -1):
        while all(len(one) > 1 and one[end] == parts[0][end] for one in parts):
            for one in parts:
                del one[end]
    return ["/".join(one) for one in parts]


def read_run(folder: Path) -> Run:
    """Reads one run directory; raises UserError naming the file that is missing or unreadable."""
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(
            f"{folder} is not a run directory: it has no metrics.jsonl; name a directory written by `train`"
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
        raise UserError(f"{path} is damaged: it must be a mapping of keys to values")
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
    """Returns the lines of a file and checks that each has the keys (and an evaluation a name).

    An unfinished last line, of a run that is still writing or was killed, is skipped.
    """
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
    """Returns the lines of a file, split only at newlines: splitlines also splits at characters within JSON strings."""
    if not path.is_file():
        return []
    try:
        *whole, rest = path.read_text(encoding="utf-8").split("\n")
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from error
    return [line + "\n" for line in whole] + ([rest] if rest else [])


def flatten(values: Any, prefix: str = "") -> dict[str, str]:
    """Flattens nested mappings to one with dotted keys and values as JSON text."""
    if not isinstance(values, dict):
        return {prefix: json.dumps(values, ensure_ascii=False)}
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
