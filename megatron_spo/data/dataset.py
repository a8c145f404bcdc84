"""Tokenised data sets: built once, kept memory-mapped, shared by all processes.

The tokenised rows of each source lie as Arrow streams in the cache of `datasets` (folder `megatron_spo`,
move it with HF_DATASETS_CACHE), in a folder named by everything that decides them: the source's content,
the tokenizer, the length limits, and the version of this code. Every process may build: one works while the
others wait, and a finished folder appears by one rename.
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


@dataclass(frozen=True)
class Dropped:
    """A row that is left out: where it stands and why. `line` counts from 1."""

    file: str
    line: int
    field: str
    reason: str


class TokenizedSet:
    """Usable rows of one or several sources, one source after another.

    tokens, chosen_tokens, rejected_tokens   int64 [n]: packed tokens (prefix counted once); scored tokens
    prompt_tokens, shared_tokens             int64 [n]: of the prompt, and of what both sequences begin with
    last_tokens                              int32 [n]: id of the token that the chosen response ends with
    row_hashes                               uint64 [n]: of token ids and prompt length
    source                                   int32 [n]: index of the source
    source_sizes, weights                    of each source: usable rows, weight in an epoch
    has_rejected                             False for a set of SFT rows
    fingerprint                              hex digest of every row's token ids and their order
    dropped                                  the rows left out
    """

    def __init__(self, sources: Sequence[TokenizedSource], weights: Sequence[float]) -> None:
        self._sources = list(sources)
        self._rows = [np.flatnonzero(source.usable) for source in sources]
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

    def get(self, index: int) -> Example:
        """The tokens of row `index`."""
        source, row = self._locate(index)
        return source.example(row)

    def describe(self, index: int) -> str:
        """Where row `index` comes from, for messages: "pairs.jsonl line 12"."""
        source, _ = self._locate(index)
        return f"{source.label} {source.unit} {self.line(index)}"

    def line(self, index: int) -> int:
        """Line or row of its source that row `index` is, counted from 1."""
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
            raise UserError(f"data: {pair} is a preference pair, {row} an SFT row; a data set must be all of one kind")
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
    """Read, check and tokenise the sources; any number of processes may call it at the same time.

    kind: "preference" demands pairs, "sft" SFT rows; "any" admits both.  progress: show a bar.  cache: folder of
    tokenised rows. UserError for unreadable sources and, unless the config drops them, for the first
    unusable row.
    """
    if not sources:
        raise UserError("data: no source is given")
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
        return f"data: {names}: empty, there is not one row"
    where = f"{dropped[0].file} {sources[0].unit} {dropped[0].line}"
    reason = f"field '{dropped[0].field}' {dropped[0].reason}"
    return f"data: none of the {len(dropped)} rows of {names} can be used; the first: {where}: {reason}"


def _refuse_bad_rows(source: TokenizedSource, data: DataConfig) -> None:
    """UserError for the first row that the config does not allow to leave out."""
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
    remedy = "mend the file, or leave such rows out with data.bad_rows=drop"
    if overlong[refused[0]]:
        remedy = "raise the limit, or shorten or leave out such rows with data.truncation=left, right or drop"
    raise UserError(f"{source.label} {source.unit} {line}: field '{field}' {reason}{more}\n{remedy}")
