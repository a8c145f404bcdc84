"""Opens sources of preference pairs and SFT rows, and validates rows.

A source is a JSON lines file, a Parquet file, a folder of `save_to_disk` or a data set on the hub. The formats are
those of TRL: `prompt`, `chosen` and `rejected` as strings or lists of messages, where the prompt may be implicit (the
common start of both); for SFT `prompt` and `completion`, or `messages`, whose last assistant turns are the completion.
With messages, `tools` and `chat_template_kwargs` are passed to the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import xxhash

from megatron_spo.data import hub
from megatron_spo.data.arrow import number_array
from megatron_spo.data.json_lines import BLOCK, RowProblem, check_text, find_lines, kind_of
from megatron_spo.errors import UserError

if TYPE_CHECKING:
    import datasets

    from megatron_spo.config.data_source import DataSource

Message = dict[str, Any]
Text = str | list[Message]


@dataclass(frozen=True)
class Pair:
    """A validated row.

    Attributes:
        prompt, chosen, rejected: all strings, or all lists of messages. `prompt` is None for a pair of strings with an
            implicit prompt, which is split off at a token border later. `rejected` is None for an SFT row.
        answer_field: name of `chosen` in the file.
        template: variables for the chat template in addition to the messages.
    """

    prompt: Text | None
    chosen: Text
    rejected: Text | None
    answer_field: str = "chosen"
    template: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RawSource:
    """An opened source.

    Attributes:
        label: name of the source in messages.
        unit: "line" or "row"; both are counted from 1.
        fingerprint: hash of the content.
        rows: for JSON lines a table of byte ranges (`start`, `end`) in `file`, otherwise the rows.
        file: the JSON lines file, or None.
    """

    label: str
    unit: str
    fingerprint: str
    rows: datasets.Dataset | pa.Table
    file: Path | None


KINDS = (".jsonl", ".json", ".parquet")
"""Extensions of the supported files."""


def open_source(source: DataSource) -> RawSource:
    """Opens a JSON lines file, a Parquet file, a folder of save_to_disk or a data set on the hub.

    Raises:
        UserError: the source does not exist or cannot be read.
    """
    check_source(source)
    path = Path(source.path)
    if path.is_dir():
        return _open_folder(path, source.split)
    if not path.exists():
        return _open_hub(source)
    return _open_parquet(path) if path.suffix.lower() == ".parquet" else _open_lines(path)


def check_source(source: DataSource) -> None:
    """Checks what the name of a source tells, without reading it.

    Raises:
        UserError: the file does not exist, or its kind is not supported.
    """
    path = Path(source.path)
    kind = path.suffix.lower()
    if path.is_dir() or (not path.exists() and kind not in KINDS):
        return
    if not path.exists():
        raise UserError(f"data: file {source.path} does not exist")
    if kind not in KINDS:
        raise UserError(
            f"data: {source.path} has the unsupported extension {kind or '(none)'!r}; "
            "supported: .jsonl and .json (one JSON object per line), .parquet"
        )


def _open_lines(path: Path) -> RawSource:
    starts, ends, digest = find_lines(path)
    rows = pa.table([number_array(starts), number_array(ends)], names=["start", "end"])
    return RawSource(str(path), "line", digest, rows, path)


def _open_parquet(path: Path) -> RawSource:
    import datasets

    try:
        digest = _digest([path])
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:  # datasets wraps the errors of pyarrow in its own
        raise UserError(f"data: {path} is not a readable Parquet file: {_first_line(error)}") from error
    return _refuse_empty(RawSource(str(path), "row", digest, rows, None))


def _open_folder(path: Path, split: str) -> RawSource:
    """Opens a folder that save_to_disk of a Dataset or DatasetDict has written."""
    import datasets

    folder, label = path, str(path)
    if (path / "dataset_dict.json").is_file():
        folder, label = path / split, f"{path} ({split})"
        if not folder.is_dir():
            raise UserError(f"data: {path} has no split {split!r}; set split of the source to one of its folders")
    if not (folder / "state.json").is_file():
        raise UserError(
            f"data: {path} is a folder, but not one written by save_to_disk; set a .jsonl or .parquet file instead"
        )
    try:
        names = [entry["filename"] for entry in json.loads((folder / "state.json").read_bytes())["_data_files"]]
        digest = _digest([folder / name for name in names])
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder can raise many errors
        raise UserError(f"data: {folder} is not a readable data set folder: {_first_line(error)}") from error
    return _refuse_empty(RawSource(label, "row", digest, rows, None))


def _digest(paths: Iterable[Path]) -> str:
    digest = xxhash.xxh3_128()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def _open_hub(source: DataSource) -> RawSource:
    import datasets

    reason = hub.no_connection(source.path, "data", "dataset")
    if reason is not None:
        hub.go_offline()
    try:
        rows = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:  # hub, network and builder errors have no common base
        why = f"it is not in the cache, and {reason}" if reason else _first_line(error)
        raise UserError(
            f"data: {source.path} is neither a local file nor a data set that can be loaded from the hub "
            f"(split {source.split!r}): {why}"
        ) from error
    label = f"{source.path} ({source.split})"
    return _refuse_empty(RawSource(label, "row", rows._fingerprint, rows, None))


def _refuse_empty(source: RawSource) -> RawSource:
    if len(source.rows) == 0:
        raise UserError(f"data: {source.label} is empty")
    return source


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def without_nulls(value: Any) -> Any:
    """Returns a row of Arrow without keys that are null, recursively.

    Arrow gives every row, message and tool the union of all keys, so null means that the key is missing.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def parse_row(row: Mapping[str, Any], *, kind: str) -> Pair:
    """Validates one row.

    Args:
        row: the row.
        kind: "preference" rejects SFT rows, "sft" rejects preference pairs, "any" accepts both.

    Raises:
        RowProblem: the row is invalid; names the field.
    """
    paired = [field for field in ("chosen", "rejected") if row.get(field) is not None]
    if kind == "sft" and paired:
        raise RowProblem(
            paired[0],
            "is a field of preference pairs; rows of spo.sft_data must have prompt and completion, or messages "
            "(without spo.sft_data the chosen responses of data.train are used)",
        )
    if kind == "preference" or (kind == "any" and ("chosen" in row or "rejected" in row)):
        return _with_template(_parse_preference(row), row)
    if "messages" in row and "completion" not in row:
        pair = Pair(*_split_messages(row), None, "messages")
        _check_turns(pair.prompt or [], pair.chosen, "messages", "messages")
        return _with_template(pair, row)
    if "completion" not in row:
        if kind == "sft":
            raise RowProblem("completion", "is missing, and so is 'messages'")
        raise RowProblem("chosen", "is missing, and so are 'completion' and 'messages'")
    completion = _text(row, "completion")
    prompt = _text(row, "prompt")
    _check_same_kind(prompt, completion, "completion")
    _check_turns(prompt, completion, "prompt", "completion")
    return _with_template(Pair(prompt, completion, None, "completion"), row)


def parse_prompt(row: Mapping[str, Any]) -> Pair:
    """Returns a row's prompt as in training: `prompt`, or the common start of `chosen` and `rejected`, or the
    `messages` before the last answer.

    If there is a `prompt`, other keys are ignored and `chosen` of the result is empty.

    Raises:
        RowProblem: the row has no valid prompt; names the field.
    """
    inside = isinstance(row.get("prompt"), str) and all(isinstance(row.get(f), list) for f in ("chosen", "rejected"))
    if inside or ("prompt" not in row and ("chosen" in row or "rejected" in row)):
        return _with_template(_parse_preference(row), row)
    if "prompt" in row or "messages" not in row:
        pair = Pair(_text(row, "prompt"), "", None)
    else:
        pair = Pair(*_split_messages(row), None, "messages")
    if not isinstance(pair.prompt, str):
        _check_prompt(pair.prompt or [], "prompt" if "prompt" in row else "messages")
    return _with_template(pair, row)


def _split_messages(row: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
    """Splits `messages` before its last assistant turns."""
    messages = _text(row, "messages")
    if isinstance(messages, str):
        raise RowProblem("messages", "is a string; must be a list of messages")
    turns = len(messages)
    while turns and messages[turns - 1]["role"] == "assistant":
        turns -= 1
    return messages[:turns], messages[turns:]


def _with_template(pair: Pair, row: Mapping[str, Any]) -> Pair:
    """Returns the pair with the template variables of its row: `tools` (a list, or JSON text of one) and
    `chat_template_kwargs`."""
    tools, more = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowProblem("tools", f"is a string that is not valid JSON ({error})") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise RowProblem("tools", f"is {kind_of(tools)}; must be a list of objects, or JSON text of one")
    if more is not None and not isinstance(more, Mapping):
        raise RowProblem("chat_template_kwargs", f"is {kind_of(more)}; must be an object")
    given: dict[str, Any] = {**({"tools": tools} if tools else {}), **(more or {})}
    if not given:
        return pair
    source = "tools" if tools else "chat_template_kwargs"
    if isinstance(pair.prompt or pair.chosen, str):
        raise RowProblem(source, "requires a chat template, but this row has strings; use lists of messages")
    check_text(given, source)
    return replace(pair, template=given)


def _parse_preference(row: Mapping[str, Any]) -> Pair:
    prompt = _text(row, "prompt") if "prompt" in row else None
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    _check_same_kind(chosen, rejected, "rejected")
    if chosen == rejected:
        raise RowProblem("rejected", "equals 'chosen'")
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        start = _common_start(chosen, rejected)
        if prompt is not None and prompt.strip() not in [message.get("content", "").strip() for message in start]:
            raise RowProblem(
                "prompt",
                "is a string, but 'chosen' is a list of messages; make it a list of messages as well",
            )
        if not start:
            raise RowProblem("prompt", "is missing, and 'chosen' and 'rejected' do not start with the same message")
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
    raise RowProblem(field, f"is {kinds[0]}, but the rest of the row is {kinds[1]}")


def _check_turns(prompt: Text, answer: Text, prompt_field: str, field: str) -> None:
    """Checks that an answer has only assistant turns and that the prompt ends before an assistant turn."""
    if isinstance(prompt, str) or isinstance(answer, str):
        return
    if not answer:
        raise RowProblem(field, "has no assistant answer after the prompt")
    _check_prompt(prompt, prompt_field)
    if answer[: len(prompt)] == prompt:
        raise RowProblem(field, "repeats the prompt; remove the prompt's messages from it, or remove 'prompt'")
    for message in answer:
        if message["role"] != "assistant":
            raise RowProblem(
                field,
                f"has a {message['role']!r} message after the prompt; only assistant turns can be scored",
            )


def _check_prompt(prompt: list[Message], field: str) -> None:
    if not prompt:
        raise RowProblem(field, "is empty; there must be a message before the assistant's answer")
    if prompt[-1]["role"] == "assistant":
        raise RowProblem(field, "ends with an assistant message; move it to the answer")


def _text(row: Mapping[str, Any], field: str) -> Text:
    """Returns the field as a valid string or list of messages."""
    if field not in row:
        raise RowProblem(field, "is missing")
    value = row[field]
    if isinstance(value, str):
        if field != "prompt" and not value.strip():
            raise RowProblem(field, "is empty")
        check_text(value, field)
        return value
    if not isinstance(value, list):
        raise RowProblem(field, f"is {kind_of(value)}; must be a string or a list of messages")
    if not value:
        raise RowProblem(field, "is an empty list")
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, field: str) -> Message:
    """Returns a message for the chat template, without keys that are null, which transformers also removes."""
    if not isinstance(message, Mapping):
        raise RowProblem(field, f"is {kind_of(message)}; must be a message with 'role' and 'content'")
    present = {key: value for key, value in message.items() if value is not None}
    calls = present.get("tool_calls", [])
    if not isinstance(calls, list):
        raise RowProblem(f"{field}.tool_calls", f"is {kind_of(calls)}; must be a list")
    says_nothing = message.get("role") == "assistant" and bool(calls)  # the calls are the answer
    for key in ("role", "content"):
        if key == "content" and says_nothing and key not in present:
            continue
        if not isinstance(message.get(key), str):
            what = kind_of(message[key]) if key in message else "missing"
            raise RowProblem(f"{field}.{key}", f"is {what}" + ("; must be a string" if key in message else ""))
    if message["role"] == "assistant" and not says_nothing and not message["content"].strip():
        raise RowProblem(f"{field}.content", "is empty")
    check_text(present, field)
    return present
