"""Sources of preference pairs, their formats, and what is wrong with a row.

A source is a file of JSON lines, a Parquet file, a folder that `datasets` saved or a data set on the hub; it is
read piece by piece. Formats are TRL's: `prompt`, `chosen`, `rejected` as strings or lists of messages, the prompt
possibly implicit (the common start of both); for SFT `prompt`, `completion`, or `messages`, whose last assistant
turns are the completion; with messages also `tools` and `chat_template_kwargs`, for the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import xxhash

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
    """A validated row. prompt, chosen and rejected are all strings or all message lists; `prompt` None
    means a string pair whose prompt is the common start, still to be cut (tokens decide where); `rejected`
    None means an SFT row. `answer_field` is what `chosen` is called in the file. `template`: what the chat template is
    given besides the messages, by keyword."""

    prompt: Text | None
    chosen: Text
    rejected: Text | None
    answer_field: str = "chosen"
    template: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RawSource:
    """An opened source.

    label: how messages name it.  unit: "line" or "row" (both counted from 1).  fingerprint: of its content.
    rows: for JSON lines a table of byte ranges (`start`, `end`) into `file`; otherwise the rows themselves.
    """

    label: str
    unit: str
    fingerprint: str
    rows: datasets.Dataset | pa.Table
    file: Path | None


def open_source(source: DataSource) -> RawSource:
    """Open a JSON-lines path, a Parquet path, a folder of save_to_disk or a hub id. UserError names what is missing or
    unreadable."""
    path = Path(source.path)
    kind = path.suffix.lower()
    if path.is_dir():
        return _open_folder(path, source.split)
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
    starts, ends, digest = find_lines(path)
    rows = pa.table([number_array(starts), number_array(ends)], names=["start", "end"])
    return RawSource(str(path), "line", digest, rows, path)


def _open_parquet(path: Path) -> RawSource:
    import datasets

    try:
        digest = _digest([path])
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:  # datasets wraps pyarrow's many errors in its own
        raise UserError(f"data: {path} is not a readable Parquet file: {_first_line(error)}") from error
    return _refuse_empty(RawSource(str(path), "row", digest, rows, None))


def _open_folder(path: Path, split: str) -> RawSource:
    """What save_to_disk of a Dataset, or of a DatasetDict, has written."""
    import datasets

    folder, label = path, str(path)
    if (path / "dataset_dict.json").is_file():
        folder, label = path / split, f"{path} ({split})"
        if not folder.is_dir():
            raise UserError(f"data: {path} has no split {split!r}; name one of its folders in the source's key split")
    if not (folder / "state.json").is_file():
        raise UserError(
            f"data: {path} is a folder, and not one of datasets' save_to_disk; name a .jsonl or .parquet file in it"
        )
    try:
        names = [entry["filename"] for entry in json.loads((folder / "state.json").read_bytes())["_data_files"]]
        digest = _digest([folder / name for name in names])
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # json, pyarrow and datasets raise what they like on a torn folder
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


def without_nulls(value: Any) -> Any:
    """A row of Arrow without the keys that are null, in objects inside it too: Arrow gives every row, message and tool
    the union of all keys, so that null stands for a key that is not there."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


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
        return _with_template(_parse_preference(row), row)
    if "messages" in row and "completion" not in row:
        pair = Pair(*_split_messages(row), None, "messages")
        _check_turns(pair.prompt or [], pair.chosen, "messages", "messages")
        return _with_template(pair, row)
    if "completion" not in row:
        if kind == "sft":
            raise RowProblem("completion", "is missing (and there are no 'messages')")
        raise RowProblem("chosen", "is missing (and there is neither 'completion' nor 'messages')")
    completion = _text(row, "completion")
    prompt = _text(row, "prompt")
    _check_same_kind(prompt, completion, "completion")
    _check_turns(prompt, completion, "prompt", "completion")
    return _with_template(Pair(prompt, completion, None, "completion"), row)


def parse_prompt(row: Mapping[str, Any]) -> Pair:
    """The prompt of a row to be answered, which training would take it to have: `prompt`, or what `chosen` and
    `rejected` have in common, or the `messages` before the last answer.

    Beside a `prompt` of its own other keys are not looked at; the pair's `chosen` is empty then. RowProblem names the
    field.
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
    """What comes before the last assistant turns of `messages`, and these."""
    messages = _text(row, "messages")
    if isinstance(messages, str):
        raise RowProblem("messages", "is a string, must be a list of messages")
    turns = len(messages)
    while turns and messages[turns - 1]["role"] == "assistant":
        turns -= 1
    return messages[:turns], messages[turns:]


def _with_template(pair: Pair, row: Mapping[str, Any]) -> Pair:
    """The pair with what its row has for the chat template: `tools` (a list, or JSON text of one) and
    `chat_template_kwargs`."""
    tools, more = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowProblem("tools", f"is a string and not valid JSON ({error})") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise RowProblem("tools", f"is {kind_of(tools)}, must be a list of objects, or JSON text of one")
    if more is not None and not isinstance(more, Mapping):
        raise RowProblem("chat_template_kwargs", f"is {kind_of(more)}, must be an object")
    given: dict[str, Any] = {**({"tools": tools} if tools else {}), **(more or {})}
    if not given:
        return pair
    source = "tools" if tools else "chat_template_kwargs"
    if isinstance(pair.prompt or pair.chosen, str):
        raise RowProblem(source, "is for a chat template, and this row is of strings; give lists of messages")
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
    _check_prompt(prompt, prompt_field)
    if answer[: len(prompt)] == prompt:
        raise RowProblem(field, "repeats the prompt; give only the answer's messages, or leave 'prompt' out")
    for message in answer:
        if message["role"] != "assistant":
            raise RowProblem(
                field,
                f"holds a {message['role']!r} message after the prompt; only assistant turns can be scored",
            )


def _check_prompt(prompt: list[Message], field: str) -> None:
    if not prompt:
        raise RowProblem(field, "is empty: nothing comes before the assistant's answer")
    if prompt[-1]["role"] == "assistant":
        raise RowProblem(field, "ends with an assistant message; move it into the answer")


def _text(row: Mapping[str, Any], field: str) -> Text:
    """The field as a clean string or message list."""
    if field not in row:
        raise RowProblem(field, "is missing")
    value = row[field]
    if isinstance(value, str):
        if field != "prompt" and not value.strip():
            raise RowProblem(field, "is empty")
        check_text(value, field)
        return value
    if not isinstance(value, list):
        raise RowProblem(field, f"is {kind_of(value)}, must be a string or a list of messages")
    if not value:
        raise RowProblem(field, "is an empty list")
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, field: str) -> Message:
    """A message as the chat template gets it: without the keys that are null, which transformers leaves out too."""
    if not isinstance(message, Mapping):
        raise RowProblem(field, f"is {kind_of(message)}, must be a message with 'role' and 'content'")
    present = {key: value for key, value in message.items() if value is not None}
    calls = present.get("tool_calls", [])
    if not isinstance(calls, list):
        raise RowProblem(f"{field}.tool_calls", f"is {kind_of(calls)}, must be a list")
    says_nothing = message.get("role") == "assistant" and bool(calls)  # the calls are the answer
    for key in ("role", "content"):
        if key == "content" and says_nothing and key not in present:
            continue
        if not isinstance(message.get(key), str):
            what = kind_of(message[key]) if key in message else "missing"
            raise RowProblem(f"{field}.{key}", f"is {what}" + (", must be a string" if key in message else ""))
    if message["role"] == "assistant" and not says_nothing and not message["content"].strip():
        raise RowProblem(f"{field}.content", "is empty")
    check_text(present, field)
    return present
