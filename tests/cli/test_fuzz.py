"""Damaged rows, templates, tokenizers and configurations: every command rejects them with one message that says where
the problem is, and accepts harmless changes.

Hypothesis draws 330 inputs. Each is a valid input with one change from the tables below. If the change is damage, the
command must end with exit code 2 and one error line; otherwise its results must be the same. The commands run in this
process, and nearly all inputs are rejected before a model is loaded. To test another change, add a line to a table.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megatron_spo.cli import main
from megatron_spo.evaluate import generate
from tests.data.helpers import QWEN_TEMPLATE, byte_tokenizer, chat
from tests.support.tiny import tiny_model

Row = dict[str, Any]
MARKS = ["<|im_start|>", "<|im_end|>"]
STRINGS = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
MESSAGES = {"prompt": chat("user: q"), "chosen": chat("assistant: a"), "rejected": chat("assistant: b")}
DEEP = "[" * 5000 + "]" * 5000


def cheap(inputs: int) -> settings:
    """Returns hypothesis settings: a number of inputs, the same in each run, without shrinking."""
    return settings(
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        max_examples=inputs,
    )


def with_key(key: str, value: Any) -> Callable[[Row], Row]:
    return lambda row: {**row, key: value}


def in_message(key: str, value: Any) -> Callable[[Row], Row]:
    return lambda row: {**row, "prompt": [{**chat("user: q")[0], key: value}]}


PROMPT_DAMAGE: list[Callable[[Row], Row]] = [  # for commands that read prompts
    *(with_key("prompt", value) for value in (None, 3, True, {}, [], [None], ["q"], "\ud800", [[]], "", float("nan"))),
    *(in_message("role", value) for value in (None, 3, [], {"a": 1}, "\udfff", "assistant")),
    *(in_message("content", value) for value in (None, 3, ["q"], {"type": "text"}, "a\ud83d")),
    in_message("name", {"deep": ["\ud800"]}),
    in_message("tool_calls", "f()"),
    *(with_key("tools", value) for value in (3, "{", ["f"], {"name": "f"}, [{"name": "\ud800"}], [{"name": "f"}])),
    *(with_key("chat_template_kwargs", value) for value in (3, "x", ["a"], {"unread": 1}, {"messages": 1})),
    lambda row: {key: value for key, value in row.items() if key == "id"},
]
PAIR_DAMAGE: list[Callable[[Row], Row]] = [  # for commands that read pairs
    *(
        with_key(side, value)
        for side in ("chosen", "rejected")
        for value in (None, 7, [], {}, "", " \n", [3], "\ud800")
    ),
    with_key("chosen", chat("user: a")),
    with_key("chosen", [{"role": "assistant", "content": " "}]),
    with_key("rejected", chat("assistant: a", "user: b")),
    lambda row: {**row, "rejected": row["chosen"]},
    lambda row: {key: value for key, value in row.items() if key != "rejected"},
]
LINE_DAMAGE = [
    b'{"prompt": "a',
    b"[1, 2]",
    b"7",
    b"null",
    b'"text"',
    b'{"prompt": "\xe9"}',
    b"\xff\xfe{\x00}\x00",
    b"\x00",
    DEEP.encode(),
    b'{"prompt": ' + DEEP.encode() + b"}",
    b'{"prompt": "a"} {"prompt": "b"}',
    b"{'prompt': 'a'}",
    b'{"prompt": ' + b"9" * 5000 + b"}",
    b"prompt,chosen,rejected",
]
TEMPLATE_DAMAGE = [
    "{% for m in messages %}",
    "{{ messages",
    "{% endfor %}",
    "{% unknown %}",
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    "{{ messages[9].content }}",
    "{{ '\\ud800' }}",
    "{{ messages.x.y }}",
    "{{ undefined_function() }}",
    "{{ messages | nofilter }}",
    "{% include 'a.jinja' %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% set x = range(10 ** 9) %}",
    "",
]
CONFIG_DAMAGE: list[tuple[Any, Any]] = [
    *(
        (key, value)
        for key in ("model", "data", "output", "loss", "optimizer")
        for value in (None, 3, [], "x\0y", "\ud800")
        if value is not None or key in ("model", "data", "output")  # other sections have defaults
    ),
    *(
        (f"data.{key}", value)
        for key, value in (
            ("train", None),
            ("train", 3),
            ("train", []),
            ("train", [[]]),
            ("train", "absent.jsonl"),
            ("train", "a\0b.jsonl"),
            ("train", "\ud800.jsonl"),
            ("train", {"path": 3}),
            ("train", {"path": "a.jsonl", "weight": -1}),
            ("max_length", 1),
            ("max_length", "many"),
            ("max_length", float("nan")),
            ("truncation", "middle"),
            ("truncation", 1),
            ("bad_rows", None),
            ("row_length", 3),
            ("num_proc", 0),
            ("chat_template", "absent.jinja"),
            ("chat_template", 3),
            ("unknown", 1),
            ("eval", "absent.parquet"),
        )
    ),
    ("model.path", 3),
    ("model.path", ""),
    ("model.unknown", 1),
    ("loss.name", "ppo"),
    ("loss.name", []),
    ("loss.beta", -1),
    ("loss.beta", float("inf")),
    ("spo.lambda", -1),
    ("spo.schedule", "sometimes"),
    ("optimizer.lr", "fast"),
    ("optimizer.lr", 0),
    ("optimizer.betas", [1]),
    ("parallel.tensor", 0),
    ("parallel.tensor", 1.5),
    ("precision.dtype", "fp64"),
    ("training.steps", -3),
    ("training.seed", 2**40),
    ("unknown", {}),
    (3, 4),
]
YAML_DAMAGE = [
    b"",
    b"[]",
    b"a: b: c",
    b"\tdata: 1",
    b"\xff\xfe",
    b"{",
    b"model: &a [*a]",
    b"model: !!python/object:os.system {}",
    b"? [1]\n: 2",
    b"%YAML 9",
    DEEP.encode(),
    b"data: {train: x}\ndata: {train: y}",
    b"\x00",
]
TOKENIZER_DAMAGE = {
    "tokenizer.json": [b"", b"{", b"[]", b"{}", b"null", b'{"model": 3}', b"\xff", DEEP.encode()],
    "tokenizer_config.json": [b"{", b"[]", b"3", b"\xff", DEEP.encode()],
    "chat_template.jinja": [b"\xff", b"{% for m in messages %}", b"{{ raise_exception('no') }}"],
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    tiny_model(folder / "model")
    byte_tokenizer(MARKS, template=QWEN_TEMPLATE).save_pretrained(folder / "model")
    return folder


@pytest.fixture(autouse=True)
def own_caches(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(job / "datasets"))
    monkeypatch.setattr(generate, "generate_by", lambda *given: [[generate.Response("", True)]] * len(given[3]))


class Capture:
    """Captures what a command prints, for each example of a test."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def run(self, *arguments: object) -> tuple[int, str]:
        self._capsys.readouterr()
        code = main([str(one) for one in arguments])
        return code, self._capsys.readouterr().err

    def refused(self, *arguments: object, where: str = "") -> None:
        code, error = self.run(*arguments)
        assert code == 2, (code, arguments)
        assert error.count("error: ") == 1 and where in error and "Traceback" not in error, (where, error)


def config_of(job: Path, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "output": str(job / "run"),
        "model": {"path": str(job / "model")},
        "data": {"train": str(job / "rows.jsonl"), "max_length": 64},
        "loss": {"name": "cpo"},
    }
    for key, value in changes.items():
        config[key] = {**config[key], **value}
    return config


def write_config(job: Path, config: Any) -> Path:
    path = job / "config.yaml"
    path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return path


def readers(job: Path, *, prompts: bool, template: Path | None = None) -> list[list[object]]:
    """Returns the commands that read rows.jsonl."""
    more = {"chat_template": str(template)} if template else {}
    found: list[list[object]] = [["plan", write_config(job, config_of(job, data=more)), "--gpus", 1, "--gpu", "h100"]]
    if not template:
        found.append(["evaluate", "--model", job / "model", "--pairs", job / "rows.jsonl"])
    if prompts and not template:
        found.append(["generate", job / "model", "--prompts", job / "rows.jsonl", "--out", job / "out.jsonl"])
    return found


def write_rows(path: Path, rows: list[Row | bytes], *, mark: bool = False, ends: bytes = b"\n") -> None:
    content = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + ends.join(content))


ROW_DAMAGE = [(change, True) for change in PROMPT_DAMAGE] + [(change, False) for change in PAIR_DAMAGE]


@cheap(120)
@given(st.sampled_from(list(enumerate(ROW_DAMAGE))), st.sampled_from([STRINGS, MESSAGES]))
def test_damaged_rows(
    job: Path, capsys: pytest.CaptureFixture[str], numbered: tuple[int, tuple[Callable[[Row], Row], bool]], base: Row
) -> None:
    which, damage = numbered
    before, mark = which % 2, which % 3 == 0
    change, prompts = damage
    row = change({**base, "id": 1})
    if row.get("prompt") == "" or (base is MESSAGES and isinstance(row.get("prompt"), str) and prompts):
        prompts = False  # without other keys it would be a prompt
    if base is STRINGS and prompts and isinstance(row.get("prompt"), list) and "tools" not in row:
        row = {**row, **{side: MESSAGES[side] for side in ("chosen", "rejected")}}
    write_rows(job / "rows.jsonl", [*[base] * before, b"", row], mark=mark, ends=b"\r\n" if mark else b"\n")
    commands = readers(job, prompts=prompts)
    line = before + 2
    Capture(capsys).refused(*commands[which % len(commands)], where=f"rows.jsonl line {line}: field '")


@cheap(30)
@given(st.sampled_from(LINE_DAMAGE), st.integers(1, 2), st.integers(0, 2))
def test_damaged_lines(job: Path, capsys: pytest.CaptureFixture[str], damage: bytes, before: int, which: int) -> None:
    write_rows(job / "rows.jsonl", [*[STRINGS] * before, damage, STRINGS])
    Capture(capsys).refused(*readers(job, prompts=True)[which], where=f"rows.jsonl line {before + 1}: field '")


@cheap(40)
@given(
    st.lists(st.sampled_from([STRINGS, MESSAGES]), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([b"\n", b"\r\n", b"\n \n"]),
)
def test_what_only_looks_different(
    job: Path, capsys: pytest.CaptureFixture[str], rows: list[Row], mark: bool, ends: bytes
) -> None:
    written = []
    for folder, options in (("plain", {}), ("odd", {"mark": mark, "ends": ends})):
        write_rows(job / "rows.jsonl", [*rows, b""], **options)  # type: ignore[arg-type]
        out = job / f"{folder}.jsonl"
        assert Capture(capsys).run("generate", job / "model", "--prompts", job / "rows.jsonl", "--out", out)[0] == 0
        written.append(out.read_text())
    assert written[0] == written[1]
    answers = (job / "odd.jsonl").read_bytes().rstrip().split(b"\n")
    write_rows(job / "answers.jsonl", list(answers), mark=mark, ends=ends)
    assert Capture(capsys).run("evaluate", job / "answers.jsonl")[0] == 0


@cheap(30)
@given(st.sampled_from(TEMPLATE_DAMAGE), st.booleans())
def test_damaged_templates(job: Path, capsys: pytest.CaptureFixture[str], damage: str, own: bool) -> None:
    write_rows(job / "rows.jsonl", [MESSAGES])
    template = job / "template.jinja"
    template.write_text(damage)
    if own:
        return Capture(capsys).refused(*readers(job, prompts=True, template=template)[0])
    file = job / "model/chat_template.jinja"
    good = file.read_text()
    try:
        file.write_text(damage)
        for command in readers(job, prompts=True)[1:]:
            Capture(capsys).refused(*command)
    finally:
        file.write_text(good)


@cheap(90)
@given(st.sampled_from(list(enumerate([*CONFIG_DAMAGE, *YAML_DAMAGE]))))
def test_damaged_configurations(job: Path, capsys: pytest.CaptureFixture[str], numbered: tuple[int, Any]) -> None:
    which, damage = numbered
    command = ("train", "reference", "plan")[which % 3]
    write_rows(job / "rows.jsonl", [STRINGS])
    path = job / "config.yaml"
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        key, value = damage
        config = config_of(job)
        section, _, name = str(key).partition(".")
        if name:
            config[section] = {**config.get(section, {}), name: value}
        else:
            config[key] = value
        path.write_text(yaml.safe_dump(config))
        if section == "data" and name in ("train", "eval", "chat_template") and isinstance(value, str):
            command = "train"  # plan assumes lengths without data, and does not read data.eval
    options = ["--gpus", 1, "--gpu", "h100"] if command == "plan" else []
    Capture(capsys).refused(command, path, *options)


@cheap(20)
@given(
    st.sampled_from([(name, content) for name, contents in TOKENIZER_DAMAGE.items() for content in contents]),
    st.integers(0, 2),
)
def test_damaged_tokenizers(
    job: Path, capsys: pytest.CaptureFixture[str], damage: tuple[str, bytes], which: int
) -> None:
    write_rows(job / "rows.jsonl", [MESSAGES])
    file, content = job / "model" / damage[0], damage[1]
    good = file.read_bytes()
    try:
        file.write_bytes(content)
        Capture(capsys).refused(*readers(job, prompts=True)[which])
    finally:
        file.write_bytes(good)


@cheap(60)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=3), st.integers(0, 2))
def test_bytes_put_into_a_file_of_rows(
    job: Path, capsys: pytest.CaptureFixture[str], place: int, new: bytes, cut: int
) -> None:
    """Arbitrary bytes are accepted only if every line is JSON with a prompt; otherwise there is one message."""
    good = b"\n".join(json.dumps(row).encode() for row in (STRINGS, MESSAGES))
    at = place % len(good)
    (job / "rows.jsonl").write_bytes(good[:at] + new + good[at + cut :])
    command = readers(job, prompts=True)[2]
    try:
        lines = (job / "rows.jsonl").read_bytes().split(b"\n")
        rows = [json.loads(text) for line in lines if (text := line.decode("utf-8-sig").strip())]
        fine = all(isinstance(row, dict) and ("prompt" in row or "chosen" in row) for row in rows)
    except ValueError:
        fine = False
    if fine:
        code, error = Capture(capsys).run(*command)
        assert code in (0, 2) and error.count("error: ") == (code == 2)
    else:
        Capture(capsys).refused(*command, where="rows.jsonl ")
