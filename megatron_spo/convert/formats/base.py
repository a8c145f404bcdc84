"""The interface of an output format."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_spo.convert.source import Model

Record = dict[str, Any]
"""JSON record of a written file: "sum" (its size and checksum) and entries of the format's own."""


@dataclass(frozen=True)
class Shard:
    """A file to write: its path within the folder, its items, and their size in bytes."""

    name: str
    items: list[Any]
    nbytes: int


class Format(Protocol):
    """A format: files of weights that can be written independently, and then the files next to them."""

    def shards(self, model: Model, limit: int) -> list[Shard]:
        """Returns the files to write, each of about `limit` bytes at most; always the same for the same model.

        Raises:
            UserError: If the model cannot be written in this format.
        """

    def write(self, path: Path, items: list[Any]) -> Record:
        """Writes the items of one file."""

    def finish(self, folder: Path, model: Model, records: dict[str, Record]) -> list[str]:
        """Writes all other files, given the records of the files of weights; returns messages for the user."""


def filled(sized: Iterable[tuple[Any, int]], limit: int) -> Iterator[tuple[list[Any], int]]:
    """Yields groups of items of at most `limit` bytes (or of one larger item), with the bytes of each group."""
    group: list[Any] = []
    total = 0
    for item, size in sized:
        if group and total + size > limit:
            yield group, total
            group, total = [], 0
        group.append(item)
        total += size
    yield group, total
