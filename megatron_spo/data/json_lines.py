"""Reads and writes JSON lines files, in the same way for every command.

A byte order mark, CRLF and blank lines are accepted. Lines are counted from 1, including blank lines. Only a line feed
ends a line, because strings may contain other separators.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_spo.errors import UserError
from megatron_spo.files import write_output

BLOCK = 1 << 20
DEEPEST = 100
"""Maximum nesting of lists and objects, because code that writes or renders them is recursive."""
_MARK = b"\xef\xbb\xbf"


class RowProblem(Exception):
    """A row is unusable because of a field. Caught for each row; never raised outside of this package."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason

    def at(self, path: Path, line: int) -> UserError:
        """Returns the same problem as an error that ends the command."""
        return UserError(f"{path} line {line}: field '{self.field}' {self.reason}")


def find_lines(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
    """Returns start and end of each line of a file (bytes, int64 [lines] each), and a digest of the content.

    Raises:
        UserError: the file is empty, is a JSON array, or cannot be read.
    """
    digest, pieces, position, head = xxhash.xxh3_128(), [], 0, b""
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                head = head or block[:64]
                digest.update(block)
                pieces.append(position + np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + 1)
                position += len(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if position == 0:
        raise UserError(f"{path} is empty")
    if head.removeprefix(_MARK).lstrip()[:1] == b"[":
        raise UserError(f"{path} is a JSON array; write one JSON object per line instead (JSON lines)")
    ends = np.concatenate([*pieces, [position]])
    ends = ends[:-1] if len(ends) > 1 and ends[-2] == position else ends
    return np.concatenate([[0], ends[:-1]]), ends, digest.hexdigest()


def read_lines(file: Path, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Iterator[bytes]:
    """Yields the content of consecutive lines, given by byte ranges, with one read."""
    with file.open("rb") as stream:
        stream.seek(int(starts[0]))
        block = stream.read(int(ends[-1] - starts[0]))
    for start, end in zip(starts - starts[0], ends - starts[0], strict=True):
        yield block[start:end]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Returns the JSON object on a line, or None for a blank line. Raises RowProblem for anything else."""
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise RowProblem("line", f"is not UTF-8 ({error.reason} at byte {error.start + 1})") from error
    if not text:
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowProblem("line", f"is not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise RowProblem("line", f"is {kind_of(row)}; must be a JSON object")
    return row


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, row) for every row of a file. All rows can be written as JSON in UTF-8.

    Raises:
        UserError: the file does not exist or has no rows, or a line is invalid; names file, line and reason.
    """
    if not path.is_file():
        raise UserError(f"{path} is a folder, not a file" if path.is_dir() else f"{path} does not exist")
    starts, ends, _ = find_lines(path)
    found = False
    for line, content in enumerate(read_lines(path, starts, ends), 1):
        try:
            if (row := parse_line(content)) is not None:
                for field, value in row.items():
                    check_text(field, "line")
                    check_text(value, field)
                found = True
                yield line, row
        except RowProblem as problem:
            raise problem.at(path, line) from problem
    if not found:
        raise UserError(f"{path} is empty")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines, atomically, and creates the folder; raises UserError if the file cannot be written."""
    write_output(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def check_text(value: Any, field: str) -> None:
    """Raises RowProblem if `value` or a list or object in it contains a string that cannot be encoded in UTF-8, or if
    it is nested more than DEEPEST levels deep."""
    todo = [(value, 0)]
    while todo:
        one, depth = todo.pop()
        if isinstance(one, str):
            try:
                one.encode("utf-8")
            except UnicodeEncodeError as error:
                raise RowProblem(field, f"contains an unpaired surrogate at character {error.start + 1}") from error
        elif isinstance(one, Mapping | list | tuple):
            if depth == DEEPEST:
                raise RowProblem(field, f"is nested more than {DEEPEST} levels deep")
            inner = [*one, *one.values()] if isinstance(one, Mapping) else one
            todo += [(each, depth + 1) for each in inner]


def kind_of(value: Any) -> str:
    """Returns the type of a JSON value for messages, such as "a number"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")
