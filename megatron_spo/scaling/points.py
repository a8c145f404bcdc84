"""The points of a fit: columns of numbers from a CSV or Parquet file, such as the table of a study."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from megatron_spo.errors import UserError

Columns = Mapping[str, np.ndarray]
"""Arrays of equal length by name."""
CONFIG_KEYS = {"lr": "optimizer.lr", "beta": "loss.beta", "lambda": "spo.lambda"}
"""What the table of a study calls a column; either name is read."""
WORDS = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class Points:
    """`columns` by the names of the law; `left_out`: rows of runs that did not end (state is not done)."""

    columns: Columns
    left_out: int = 0


def read_points(path: Path, required: Sequence[str], optional: Sequence[str], names: Mapping[str, str]) -> Points:
    """Finite numbers of the columns asked for.

    Args:
        path: .parquet, or CSV with a header.
        required, optional: the law's names of columns.
        names: the file's names of columns, by the law's, where they differ.

    Raises:
        UserError: naming the column that is missing, or the line (CSV: of the file; Parquet: row + 1) with a value
            that is no finite number.
    """
    rows = _read(path)
    header = list(rows[0])
    if unknown := sorted(set(names) - {*required, *optional}):
        raise UserError(
            f"--column {unknown[0]}=...: this law has no such column; it reads {', '.join([*required, *optional])}"
        )
    found: dict[str, str] = {}
    for name in [*required, *optional]:
        candidates = [names[name]] if name in names else [name, CONFIG_KEYS.get(name, name)]
        present = [candidate for candidate in candidates if candidate in header]
        if present:
            found[name] = present[0]
        elif name in required or name in names:
            raise UserError(
                f"{path}: no column {candidates[0]!r}; it has {', '.join(header)}. --column {name}=NAME names another"
            )
    kept = [(line, row) for line, row in enumerate(rows, 2) if row.get("state", "done") == "done"]
    if not kept:
        raise UserError(f"{path}: no row of a run that is done")
    columns = {
        name: np.array([_number(row[column], path, line, column) for line, row in kept])
        for name, column in found.items()
    }
    return Points(columns, len(rows) - len(kept))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            rows = parquet.read_table(path).to_pylist()
        else:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file, strict=True))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of points") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV (or Parquet, by its ending): {error}") from None
    if not rows:
        raise UserError(f"{path}: has no rows")
    return rows


def _number(value: Any, path: Path, line: int, column: str) -> float:
    try:
        number = WORDS[value.lower()] if isinstance(value, str) and value.lower() in WORDS else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{path} line {line}: {column} = {value!r} is not a finite number; correct or delete the line")
    return number
