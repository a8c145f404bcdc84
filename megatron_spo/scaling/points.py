"""Reads the points of a fit from a CSV or Parquet file, such as the table of a study."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from megatron_spo.errors import UserError

Columns = Mapping[str, np.ndarray]
"""Arrays of equal length by name."""
STUDY_NAMES = {
    "lr": ("optimizer.lr",),
    "beta": ("loss.beta",),
    "lambda": ("spo.lambda",),
    "rows": ("data.rows",),
    "loss": ("eval/loss/sft", "train/loss/sft"),
    "kl": ("score/kl",),
}
"""Column name of a law -> its names in the table of a study, by preference; all are accepted."""
WORDS = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class Points:
    """Points of a fit.

    Attributes:
        columns: Columns, by the law's names.
        left_out: Number of skipped rows, those of runs that are not done.
        names: Names of the columns in the file, by the law's names.
    """

    columns: Columns
    left_out: int = 0
    names: Mapping[str, str] = field(default_factory=dict)


def read_points(path: Path, required: Sequence[str], optional: Sequence[str], names: Mapping[str, str]) -> Points:
    """Reads columns of finite numbers, of all rows. See `read_groups` for the arguments and errors."""
    (found,) = read_groups(path, required, optional, names).values()
    return found


def read_groups(
    path: Path,
    required: Sequence[str],
    optional: Sequence[str],
    names: Mapping[str, str],
    *,
    by: str | None = None,
    only: Mapping[str, Any] | None = None,
) -> dict[str, Points]:
    """Reads columns of finite numbers.

    Args:
        path: Parquet file (.parquet), or CSV file with a header.
        required: Columns that the law needs.
        optional: Columns that the law uses if they exist.
        names: Names of columns in the file, by the law's names, if they differ.
        by: Column whose values are the groups; None: one group with the name "".
        only: Values of columns; rows with other values are ignored.

    Raises:
        UserError: If a column is missing or a value is not a finite number; the message names the column, or the line
            (in a Parquet file, row + 1).
    """
    rows = _read(path)
    header = list(rows[0])
    found = _find(path, header, required, optional, names)
    wanted = [(line, row) for line, row in enumerate(rows, 2) if _matches(row, only or {}, path)]
    kept = [(line, row) for line, row in wanted if row.get("state", "done") == "done"]
    if not kept:
        raise UserError(f"{path}: no row{' of these values' if only else ''} has the state done; wait for the runs to "
                        "finish")  # fmt: skip
    if by is not None and by not in header:
        raise UserError(f"{path}: column {by!r} is missing; the file has {', '.join(header)}")
    groups: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for line, row in kept:
        groups.setdefault("" if by is None else str(row[by]), []).append((line, row))
    return {
        group: Points(
            {
                name: np.array([_number(row[column], path, line, column) for line, row in members])
                for name, column in found.items()
            },
            len(wanted) - len(kept),
            found,
        )
        for group, members in groups.items()
    }


def _find(
    path: Path, header: Sequence[str], required: Sequence[str], optional: Sequence[str], names: Mapping[str, str]
) -> dict[str, str]:
    """Returns the columns of the file by the law's names."""
    if unknown := sorted(set(names) - {*required, *optional}):
        raise UserError(
            f"--column {unknown[0]}=...: the law has no column {unknown[0]!r}; it reads "
            f"{', '.join([*required, *optional])}"
        )
    found: dict[str, str] = {}
    for name in [*required, *optional]:
        candidates = [names[name]] if name in names else [name, *STUDY_NAMES.get(name, ())]
        present = [candidate for candidate in candidates if candidate in header]
        if present:
            found[name] = present[0]
        elif name in required or name in names:
            raise UserError(
                f"{path}: column {candidates[0]!r} is missing; the file has {', '.join(header)}. Set --column "
                f"{name}=NAME to read another one"
            )
    return found


def _matches(row: Mapping[str, Any], only: Mapping[str, Any], path: Path) -> bool:
    if missing := sorted(set(only) - set(row)):
        raise UserError(f"{path}: column {missing[0]!r} is missing; the file has {', '.join(row)}")
    return all(_same(row[name], value) for name, value in only.items())


def _same(one: Any, other: Any) -> bool:
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return str(one) == str(other)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            rows = parquet.read_table(path).to_pylist()
        else:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file, strict=True))
    except FileNotFoundError:
        raise UserError(f"{path}: the file of points does not exist") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV (or as Parquet, if it ends in .parquet): {error}") from None
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def _number(value: Any, path: Path, line: int, column: str) -> float:
    try:
        number = WORDS[value.lower()] if isinstance(value, str) and value.lower() in WORDS else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{path} line {line}: {column} = {value!r} is not a finite number; correct or delete the line")
    return number
