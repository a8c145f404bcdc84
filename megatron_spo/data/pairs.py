"""Sources of preference pairs, their formats, and what is wrong with a row.

A source is a file of JSON lines, a Parquet file or a data set on the hub; it is read piece by piece.
Formats are TRL's: `prompt`, `chosen`, `rejected` as strings or lists of messages, the prompt possibly
implicit (the common start of both); for SFT `prompt`, `completion`, or `messages`, whose last assistant
turns are the completion.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_spo.errors import UserError

if TYPE_CHECKING:
    import datasets

    from megatron_spo.config.schema import DataSource

Message = dict[str, Any]
Text = str | list[Message]
BLOCK = 1 << 20


class RowProblem(Exception):
    """A row is unusable: the field and the reason. Caught per row; never leaves this package."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


@dataclass(frozen=True)
class Pair:
    """A validated row. prompt, chosen and rejected are all strings or all message lists; `prompt` None
    means a string pair whose prompt is the common start, still to be cut (tokens decide where); `rejected`
    None means an SFT row. `answer_field` is what `chosen` is called in the file."""

    prompt: Text | None
    chosen: Text
    rejected: Text | None
    answer_field: str = "chosen"


@dataclass(frozen=True)
class RawSource:
    """An opened source.

    label: how messages name it.  unit: "line" or "row" (both counted from 1).  fingerprint: of its content.
    rows: for JSON lines a table of byte ranges (`start`, `end`) into `file`; otherwise the rows themselves.
    """

    label: str
    unit: str
    fingerprint: str
    rows: datasets.Dataset
    file: Path | None


def open_source(source: DataSource) -> RawSource:
    """Open a JSON-lines path, a Parquet path or a hub id. UserError names what is missing or unreadable."""
    path = Path(source.path)
    kind = path.suffix.lower()
    if path.is_dir():
        raise UserError(f"data: {source.path} is a folder; name a .jsonl or .parquet file in it")
    if not path.exists() and kind not in (".jsonl", ".json", ".parquet"):
        return _open_hub(source)
    if not path.exists():
        raise UserError(f"data: file {source.path} does not exist")
    if kind in (".jsonl", ".json"):
        return _open_lines(path)
    if kind == ".parquet":
        return _open_parquet(path)
    raise UserError(
        f"data: {source.path} has the unknown extension {kind or '(none)'!r}; "
        "known are .jsonl and .json (one JSON object a line) and .parquet"
    )


def _open_lines(path: Path) -> RawSource:
    import datasets

    digest, pieces, position = xxhash.xxh3_128(), [], 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            pieces.append(position + np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + 1)
            position += len(block)
    ends = np.concatenate([*pieces, [position]]) if pieces else np.zeros(1, dtype=np.int64)
    ends = ends[:-1] if len(ends) > 1 and ends[-2] == position else ends
    if position == 0:
        raise UserError(f"data: {path} is empty")
    starts = np.concatenate([[0], ends[:-1]])
    with path.open("rb") as file:
        if file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            raise UserError(f"data: {path} is a JSON array; write one JSON object a line instead (JSON lines)")
    rows = datasets.Dataset.from_dict({"start": starts, "end": ends})
    return RawSource(str(path), "line", digest.hexdigest(), rows, path)


def _open_parquet(path: Path) -> RawSource:
    import datasets

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:  # datasets wraps pyarrow's many errors in its own
        raise UserError(f"data: {path} is not a readable Parquet file: {_first_line(error)}") from error
    return _refuse_empty(RawSource(str(path), "row", digest.hexdigest(), rows, None))


def _open_hub(source: DataSource) -> RawSource:
    import datasets

    try:
        rows = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:  # hub, network and builder errors have no common base
        raise UserError(
            f"data: {source.path} is neither a file here nor a data set that can be loaded from the hub "
            f"(split {source.split!r}): {_first_line(error)}"
        ) from error
    label = f"{source.path} ({source.split})"
    return _refuse_empty(RawSource(label, "row", rows._fingerprint, rows, None))


def _refuse_empty(source: RawSource) -> RawSource:
    if len(source.rows) == 0:
        raise UserError(f"data: {source.label} is empty")
    return source


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def read_lines(file: Path, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Iterator[bytes]:
    """The byte ranges of consecutive lines, read at once."""
    with file.open("rb") as stream:
        stream.seek(int(starts[0]))
        block = stream.read(int(ends[-1] - starts[0]))
    for start, end in zip(starts - starts[0], ends - starts[0], strict=True):
        yield block[start:end]


def parse_line(line: bytes) -> Mapping[str, Any] | None:
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
        raise RowProblem("line", f"is {_name(row)}, must be a JSON object")
    return row


def parse_row(row: Mapping[str, Any], *, kind: str) -> Pair:
    """Validate one row. kind: "preference" refuses SFT rows, "sft" preference pairs, "any" neither.

    RowProblem names the field.
    """
    paired = [field for field in ("chosen", "rejected") if row.get(field) is not None]
    if kind == "sft" and paired:
        raise RowProblem(
            paired[0],
            "belongs to a preference pair; spo.sft_data takes rows of prompt and completion, or of messages (without "
            "spo.sft_data the SFT rows are the chosen responses of data.train)",
        )
    if kind == "preference" or (kind == "any" and ("chosen" in row or "rejected" in row)):
        return _parse_preference(row)
    if "messages" in row and "completion" not in row:
        messages = _text(row, "messages")
        if isinstance(messages, str):
            raise RowProblem("messages", "is a string, must be a list of messages")
        turns = len(messages)
        while turns and messages[turns - 1]["role"] == "assistant":
            turns -= 1
        _check_turns(messages[:turns], messages[turns:], "messages", "messages")
        return Pair(messages[:turns], messages[turns:], None, "messages")
    if "completion" not in row:
        if kind == "sft":
            raise RowProblem("completion", "is missing (and there are no 'messages')")
        raise RowProblem("chosen", "is missing (and there is neither 'completion' nor 'messages')")
    completion = _text(row, "completion")
    prompt = _text(row, "prompt")
    _check_same_kind(prompt, completion, "completion")
    _check_turns(prompt, completion, "prompt", "completion")
    return Pair(prompt, completion, None, "completion")


def _parse_preference(row: Mapping[str, Any]) -> Pair:
    prompt = _text(row, "prompt") if "prompt" in row else None
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    _check_same_kind(chosen, rejected, "rejected")
    if chosen == rejected:
        raise RowProblem("rejected", "equals 'chosen'")
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        start = _common_start(chosen, rejected)
        if prompt is not None and prompt.strip() not in [message["content"].strip() for message in start]:
            raise RowProblem(
                "prompt",
                "is a string while 'chosen' is a list of messages; make it a list of messages as well",
            )
        if not start:
            raise RowProblem(
                "prompt", "is missing, and 'chosen' and 'rejected' have no message in common at their start"
            )
        prompt, chosen, rejected = start, chosen[len(start) :], rejected[len(start) :]
    if prompt is not None:
        for field, answer in (("chosen", chosen), ("rejected", rejected)):
            _check_same_kind(prompt, answer, field)
            _check_turns(prompt, answer, "prompt", field)
    return Pair(prompt, chosen, rejected)


def _common_start(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    return chosen[:count]


def _check_same_kind(one: Text, other: Text, field: str) -> None:
    if isinstance(one, str) == isinstance(other, str):
        return
    kinds = ["a string", "a list of messages"]
    if not isinstance(other, str):
        kinds.reverse()
    raise RowProblem(field, f"is {kinds[0]} while the rest of the row is {kinds[1]}")


def _check_turns(prompt: Text, answer: Text, prompt_field: str, field: str) -> None:
    """An answer is assistant turns and nothing else; a prompt ends before the assistant speaks."""
    if isinstance(prompt, str) or isinstance(answer, str):
        return
    if not answer:
        raise RowProblem(field, "holds no assistant answer after the prompt")
    if not prompt:
        raise RowProblem(prompt_field, "is empty: nothing comes before the assistant's answer")
    if prompt[-1]["role"] == "assistant":
        raise RowProblem(prompt_field, "ends with an assistant message; move it into the answer")
    if answer[: len(prompt)] == prompt:
        raise RowProblem(field, "repeats the prompt; give only the answer's messages, or leave 'prompt' out")
    for message in answer:
        if message["role"] != "assistant":
            raise RowProblem(
                field,
                f"holds a {message['role']!r} message after the prompt; only assistant turns can be scored",
            )


def _text(row: Mapping[str, Any], field: str) -> Text:
    """The field as a clean string or message list."""
    if field not in row:
        raise RowProblem(field, "is missing")
    value = row[field]
    if isinstance(value, str):
        if field != "prompt" and not value.strip():
            raise RowProblem(field, "is empty")
        return _clean(value, field)
    if not isinstance(value, list):
        raise RowProblem(field, f"is {_name(value)}, must be a string or a list of messages")
    if not value:
        raise RowProblem(field, "is an empty list")
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, field: str) -> Message:
    if not isinstance(message, Mapping):
        raise RowProblem(field, f"is {_name(message)}, must be a message with 'role' and 'content'")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            what = _name(message[key]) if key in message else "missing"
            raise RowProblem(f"{field}.{key}", f"is {what}" + (", must be a string" if key in message else ""))
    if message["role"] == "assistant" and not message["content"].strip():
        raise RowProblem(f"{field}.content", "is empty")
    # Arrow gives every message the union of all keys: those without a value were not in the file.
    return {key: _clean(value, field) for key, value in message.items() if value is not None}


def _clean(value: Any, field: str) -> Any:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowProblem(field, f"holds half a surrogate pair at character {error.start + 1}") from error
    return value


def _name(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")
