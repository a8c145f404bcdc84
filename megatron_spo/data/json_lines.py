"""Files of JSON lines, read alike by every command: a byte order mark, CRLF and blank lines make no difference.

Lines are counted from 1, blank ones included. Only a line feed ends a line: text may hold other separators.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_spo.errors import UserError

BLOCK = 1 << 20
DEEPEST = 100
"""Lists and objects inside each other, at most: what writes or renders them recurses."""
_MARK = b"\xef\xbb\xbf"


class RowProblem(Exception):
    """A row is unusable: the field and the reason. Caught per row; never leaves this package."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason

    def at(self, path: Path, line: int) -> UserError:
        """The same as an error that ends the command."""
        return UserError(f"{path} line {line}: field '{self.field}' {self.reason}")


def find_lines(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
    """Where each line of a file starts and ends (bytes, int64 [lines] each), and a digest of the whole content.

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
        raise UserError(f"{path} is a JSON array; write one JSON object a line instead (JSON lines)")
    ends = np.concatenate([*pieces, [position]])
    ends = ends[:-1] if len(ends) > 1 and ends[-2] == position else ends
    return np.concatenate([[0], ends[:-1]]), ends, digest.hexdigest()


def read_lines(file: Path, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Iterator[bytes]:
    """The byte ranges of consecutive lines, read at once."""
    with file.open("rb") as stream:
        stream.seek(int(starts[0]))
        block = stream.read(int(ends[-1] - starts[0]))
    for start, end in zip(starts - starts[0], ends - starts[0], strict=True):
        yield block[start:end]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object on a line, None for a blank line; RowProblem otherwise."""
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
        raise RowProblem("line", f"is {kind_of(row)}, must be a JSON object")
    return row


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of every row of a file; each can be written again as JSON in UTF-8.

    Raises:
        UserError: there is no such file or no row in it, or a line is none; names file, line and reason.
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


def check_text(value: Any, field: str) -> None:
    """RowProblem where a string in `value`, or in lists and objects inside it, cannot be encoded, or where these are
    nested deeper than DEEPEST."""
    todo = [(value, 0)]
    while todo:
        one, depth = todo.pop()
        if isinstance(one, str):
            try:
                one.encode("utf-8")
            except UnicodeEncodeError as error:
                raise RowProblem(field, f"holds half a surrogate pair at character {error.start + 1}") from error
        elif isinstance(one, Mapping | list | tuple):
            if depth == DEEPEST:
                raise RowProblem(field, f"is nested more than {DEEPEST} deep")
            inner = [*one, *one.values()] if isinstance(one, Mapping) else one
            todo += [(each, depth + 1) for each in inner]


def kind_of(value: Any) -> str:
    """What a value of JSON is, for messages: "a number"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")
