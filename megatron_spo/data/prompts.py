"""Reads and tokenises files of prompts with the code for training rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_spo.data.json_lines import RowProblem, read_rows
from megatron_spo.data.pairs import Pair, parse_prompt
from megatron_spo.data.tokenize import RowTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = dict[str, Any]


def tokenize_prompts(path: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, Row, list[int]]]:
    """Yields (position, row, token ids of the prompt) for each row of a JSON lines file.

    The position is "FILE line N". The token ids are the same as in training. An implicit prompt is moved from `chosen`
    and `rejected` to the key `prompt`.

    Raises:
        UserError: a row is invalid; names the file, the line, the field and the reason.
    """
    rows = RowTokenizer(tokenizer)
    for line, row in read_rows(path):
        try:
            pair = rows.with_prompt(parse_prompt(row))
            ids = rows.prompt_ids(pair)
        except RowProblem as problem:
            raise problem.at(path, line) from problem
        yield f"{path} line {line}", explicit(row, pair), ids


def explicit(row: Row, pair: Pair) -> Row:
    """Returns the row with the prompt of `pair` as a key."""
    if row.get("prompt") == pair.prompt or (isinstance(pair.prompt, list) and isinstance(row.get("prompt"), list)):
        return row
    answers = {} if pair.rejected is None else {"chosen": pair.chosen, "rejected": pair.rejected}
    return {**row, "prompt": pair.prompt, **answers}


def check_prompt(row: Row, path: Path, line: int) -> None:
    """Checks that a row has a valid `prompt`.

    Raises:
        UserError: it has none.
    """
    try:
        if "prompt" not in row:
            raise RowProblem("prompt", "is missing")
        parse_prompt(row)
    except RowProblem as problem:
        raise problem.at(path, line) from problem
