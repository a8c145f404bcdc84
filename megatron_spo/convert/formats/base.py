"""What a format to write must offer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_spo.convert.source import Model

Record = dict[str, Any]
"""What is known of a written file, as JSON keeps it: "sum", its size and checksum, and the format's own entries."""


@dataclass(frozen=True)
class Shard:
    """A file to write: its path within the folder, what the format puts into it, and how much that is in bytes."""

    name: str
    items: list[Any]
    nbytes: int


class Form(Protocol):
    """A format: a model is written as files that know nothing of each other, then all else beside them."""

    def shards(self, model: Model, limit: int) -> list[Shard]:
        """The files, each of about `limit` bytes at most; the same ones for the same model.

        Raises:
            UserError: the model cannot be written in this format.
        """

    def write(self, path: Path, items: list[Any]) -> Record:
        """Write the items of one file."""

    def finish(self, folder: Path, model: Model, records: dict[str, Record]) -> list[str]:
        """Write what goes with the files, whose records are given by name; returns what the user should know."""


def filled(sized: Iterable[tuple[Any, int]], limit: int) -> Iterator[tuple[list[Any], int]]:
    """Items in groups of at most `limit` bytes, or of one item, with the bytes of each group."""
    group: list[Any] = []
    total = 0
    for item, size in sized:
        if group and total + size > limit:
            yield group, total
            group, total = [], 0
        group.append(item)
        total += size
    yield group, total
