"""Tokenised data sets: built once, memory-mapped, and shared by all processes.

The tokenised rows of each source are stored as Arrow streams in the cache of `datasets` (folder `megatron_spo`; set
HF_DATASETS_CACHE to move it). The folder name is a hash of the content of the source, the tokenizer, the length limits
and the version of this code. If several processes build the same folder, one works while the others wait; the finished
folder is renamed into place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_spo.data.pairs import open_source
from megatron_spo.data.rows import Example
from megatron_spo.data.tokenized_files import TokenizedSource, tokenize_source
from megatron_spo.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from megatron_spo.config.data_source import DataSource
    from megatron_spo.config.schema import DataConfig


Int64 = NDArray[np.int64]

SUBSET = 7
"""Makes the draw of a subset independent of the order of the rows, which uses the same seed."""


@dataclass(frozen=True)
class Dropped:
    """A row that is dropped: where it is and why. `line` counts from 1."""

    file: str
    line: int
    field: str
    reason: str


class TokenizedSet:
    """The usable rows of one or more sources, in the order of the sources.

    Attributes:
        tokens: int64 [n], packed tokens of each row; the shared prefix is counted once.
        chosen_tokens, rejected_tokens: int64 [n], scored tokens of each response.
        prompt_tokens, shared_tokens: int64 [n], length of the prompt, and of the common prefix of both sequences.
        last_tokens: int32 [n], id of the last token of the chosen response.
        row_hashes: uint64 [n], hash of token ids and prompt length.
        source: int32 [n], index of the source.
        source_sizes, weights: number of usable rows of each source, and its weight in an epoch.
        has_rejected: False for SFT rows.
        fingerprint: hex digest of the token ids of all rows, in order.
        dropped: the rows that are left out.
    """

    def __init__(
        self, sources: Sequence[TokenizedSource], weights: Sequence[float], rows: Sequence[Int64] | None = None
    ) -> None:
        self._sources = list(sources)
        self._rows = [np.flatnonzero(source.usable) for source in sources] if rows is None else list(rows)
        self.weights = tuple(weights)
        self.source_sizes = tuple(len(rows) for rows in self._rows)
        self._starts = np.cumsum([0, *self.source_sizes])
        self.source = np.repeat(np.arange(len(sources), dtype=np.int32), self.source_sizes)
        self.chosen_tokens = self._column("chosen_tokens").astype(np.int64)
        self.rejected_tokens = self._column("rejected_tokens").astype(np.int64)
        self.tokens = self._column("tokens").astype(np.int64)
        self.prompt_tokens = self._column("prompt_length").astype(np.int64)
        self.shared_tokens = self._column("shared").astype(np.int64)
        self.row_hashes = self._column("row_hash")
        self.last_tokens = np.concatenate(
            [source.last_tokens()[rows] for source, rows in zip(self._sources, self._rows, strict=True)]
        )
        self.has_rejected = self._one_kind()
        self.fingerprint = hashlib.sha256(self.row_hashes.tobytes()).hexdigest()[:32]
        self.dropped = [Dropped(source.label, *problem) for source in sources for problem in source.problems()]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def drawn(self, count: int, seed: int) -> TokenizedSet:
        """Returns a set of `count` of the rows, in their order. For one seed, a smaller set is part of a larger one.

        Raises:
            UserError: there are fewer rows.
        """
        if count > len(self):
            files = ", ".join(source.label for source in self._sources)
            raise UserError(f"data.rows = {count}, but {files} has {len(self)} usable rows; set data.rows to at most "
                            "that, or null for all")  # fmt: skip
        kept = np.sort(np.random.Generator(np.random.PCG64([SUBSET, seed])).permutation(len(self))[:count])
        parts = np.split(kept, np.searchsorted(kept, self._starts[1:-1]))
        rows = [rows[part - start] for rows, part, start in zip(self._rows, parts, self._starts, strict=False)]
        return TokenizedSet(self._sources, self.weights, rows)

    def get(self, index: int) -> Example:
        """Returns the token ids of row `index`."""
        source, row = self._locate(index)
        return source.example(row)

    def describe(self, index: int) -> str:
        """Returns where row `index` comes from, for messages: "pairs.jsonl line 12"."""
        source, _ = self._locate(index)
        return f"{source.label} {source.unit} {self.line(index)}"

    def line(self, index: int) -> int:
        """Returns the line or row number of row `index` in its source, counted from 1."""
        source, row = self._locate(index)
        return int(source.lines[row])

    def _locate(self, index: int) -> tuple[TokenizedSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        source = int(self.source[index])
        return self._sources[source], int(self._rows[source][index - self._starts[source]])

    def _column(self, name: str) -> NDArray[np.generic]:
        parts = [source.column(name)[rows] for source, rows in zip(self._sources, self._rows, strict=True)]
        return np.concatenate(parts)

    def _one_kind(self) -> bool:
        paired = np.flatnonzero(self.rejected_tokens > 0)
        single = np.flatnonzero(self.rejected_tokens == 0)
        if len(paired) and len(single):
            pair, row = self.describe(int(paired[0])), self.describe(int(single[0]))
            raise UserError(
                f"data: {pair} is a preference pair, but {row} is an SFT row; use one kind of rows per data set"
            )
        return len(paired) > 0


def build_dataset(
    sources: Sequence[DataSource],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    kind: str = "preference",
    progress: bool = False,
    cache: Path | None = None,
) -> TokenizedSet:
    """Reads, checks and tokenises the sources. Several processes may call it at the same time.

    Args:
        sources: the sources.
        data: length limits, and what to do with unusable rows.
        tokenizer: the tokenizer.
        kind: "preference" accepts pairs only, "sft" SFT rows only, "any" both.
        progress: show a progress bar.
        cache: folder for the tokenised rows; None: in the cache of `datasets`.

    Raises:
        UserError: a source cannot be read, or a row is unusable and `data` does not allow dropping it.
    """
    if not sources:
        raise UserError("data: there are no sources; set data.train")
    built = []
    for source in sources:
        raw = open_source(source)
        tokenized = tokenize_source(raw, data, tokenizer, kind=kind, progress=progress, cache=cache)
        _refuse_bad_rows(tokenized, data)
        built.append(tokenized)
    result = TokenizedSet(built, [source.weight for source in sources])
    if len(result) == 0:
        raise UserError(_nothing_left(built, result.dropped))
    return result


def _nothing_left(sources: Sequence[TokenizedSource], dropped: Sequence[Dropped]) -> str:
    names = ", ".join(source.label for source in sources)
    if not dropped:
        return f"data: {names}: there are no rows"
    where = f"{dropped[0].file} {sources[0].unit} {dropped[0].line}"
    reason = f"field '{dropped[0].field}' {dropped[0].reason}"
    return f"data: none of the {len(dropped)} rows of {names} can be used; first problem: {where}: {reason}"


def _refuse_bad_rows(source: TokenizedSource, data: DataConfig) -> None:
    """Raises UserError for the first unusable row that `data` does not allow dropping."""
    if data.bad_rows == "drop":
        return
    bad, overlong = ~source.usable, source.column("overlong").astype(bool)
    refused = np.flatnonzero(bad & ~overlong if data.truncation == "drop" else bad)
    if len(refused) == 0:
        return
    line, field, reason = source.problem(int(refused[0]))
    others = [str(int(source.lines[row])) for row in refused[1:6]]
    more = ""
    if others:
        more = f"\n{len(refused) - 1} more such {source.unit}s: {', '.join(others)}" + (
            ", ..." if len(refused) > 6 else ""
        )
    remedy = "correct the file, or set data.bad_rows=drop to drop such rows"
    if overlong[refused[0]]:
        remedy = "raise the limit, or set data.truncation=left, right or drop to shorten or drop such rows"
    raise UserError(f"{source.label} {source.unit} {line}: field '{field}' {reason}{more}\n{remedy}")
