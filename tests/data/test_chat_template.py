"""Chat templates: a prompt has the same tokens in training, evaluation and generation with every kind of template;
`tools` and `chat_template_kwargs` are passed as in TRL; the date is fixed; a rejected row gives one message."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from trl.data_utils import apply_chat_template

from megatron_spo.cli import main
from megatron_spo.data import chat_template
from megatron_spo.data.chat_template import template_date
from megatron_spo.data.json_lines import RowProblem
from megatron_spo.data.pairs import parse_prompt, parse_row
from megatron_spo.data.prompts import tokenize_prompts
from megatron_spo.data.rows import Example
from megatron_spo.data.tokenize import LengthLimits, RowTokenizer
from megatron_spo.errors import UserError
from megatron_spo.evaluate import generate
from tests.data.helpers import QWEN_TEMPLATE, build, byte_tokenizer, chat, lines
from tests.support.tiny import tiny_model

MARKS = ["<|im_start|>", "<|im_end|>", "<|eom|>", "</call>"]
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "plain": QWEN_TEMPLATE,
    "system refused, roles renamed, begin-of-sequence in the text": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
    ),
    "tools": (
        "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<call>{{ c.function | tojson }}</call>{% endfor %}{{ '<|eom|>' if m.tool_calls else '<|im_end|>' }}\n"
        "{% endfor %}" + GENERATION
    ),
    "earlier thoughts dropped": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' in m.content "
        "and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}" + GENERATION
    ),
    "thinking switched": (
        QWEN_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n{% if not thinking %}<think></think>{% endif %}"
                              "{% endif %}")
        .replace("{{ m['content'] }}", "{% if m.role == 'assistant' and not thinking %}<think></think>{% endif %}"
                 "{{ m['content'] }}")
    ),
    "the prompt opens a thought": QWEN_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
    "the day": "{{ strftime_now('%d %B %Y') }}{{ date_string }}" + QWEN_TEMPLATE,
}  # fmt: skip
TOKENIZERS: dict[str, Any] = {name: byte_tokenizer(MARKS, bos="<s>", template=text) for name, text in TEMPLATES.items()}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": {"city": {"enum": ["Oslo", None]}}}}
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "unit": None}}}

words = st.text(st.sampled_from("ab:x <>é😀"), min_size=1, max_size=6).filter(str.strip)
turns = st.lists(words, min_size=1, max_size=3).filter(lambda texts: len(texts) != 2)


def tokenize(row: dict, tokenizer: PreTrainedTokenizerFast, limits: LengthLimits | None = None) -> Example:
    rows = RowTokenizer(tokenizer) if limits is None else RowTokenizer(tokenizer, limits)
    return rows.tokenize(parse_row(row, kind="any"))


def prompt_of(example: Example) -> list[int]:
    return example.chosen_ids[: example.prompt_length].tolist()


@given(st.sampled_from(sorted(TEMPLATES)), turns, words, st.booleans(), st.booleans(), st.sampled_from([None, True]))
@settings(deadline=None, max_examples=150)
def test_a_prompt_has_the_tokens_of_the_training_row(
    name: str, texts: list[str], answer: str, system: bool, thought: bool, thinking: bool | None
) -> None:
    said = [f"<think>hm</think>{text}" if thought and i == 1 else text for i, text in enumerate(texts)]
    prompt = [{"role": ["user", "assistant"][i % 2], "content": text} for i, text in enumerate(said)]
    if system:
        prompt = [{"role": "system", "content": "s"}, *prompt]
    row: dict[str, Any] = {"prompt": prompt}
    if name == "tools":
        row["tools"] = TOOLS
    if name == "thinking switched" and thinking:
        row["chat_template_kwargs"] = {"thinking": thinking}
    whole = {**row, "chosen": [{"role": "assistant", "content": answer}], "rejected": chat("assistant: other")}
    rows = RowTokenizer(TOKENIZERS[name])
    try:
        trained = prompt_of(tokenize(whole, TOKENIZERS[name]))
    except RowProblem as problem:
        assert (problem.field == "prompt") == (system and name.startswith("system refused"))
        assert problem.field == "prompt" or name == "the prompt opens a thought"
        if problem.field == "prompt":
            with pytest.raises(RowProblem, match="rejected by the chat template: no system role"):
                rows.prompt_ids(parse_prompt(row))
        return
    assert name != "the prompt opens a thought"
    implicit = {key: value for key, value in whole.items() if key != "prompt"}
    implicit |= {side: prompt + whole[side] for side in ("chosen", "rejected")}
    for form in (row, whole, implicit):
        assert rows.prompt_ids(parse_prompt(form)) == trained
    kwargs = row.get("chat_template_kwargs", {})
    tokenizer = TOKENIZERS[name]
    if name != "the day":  # transformers' own ids
        ids = tokenizer.apply_chat_template(prompt, tools=row.get("tools"), add_generation_prompt=True, **kwargs)
        assert trained == ids["input_ids"]


def test_generate_feeds_the_prompts_of_the_training_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """String rows with a begin-of-sequence token, messages with tools, and rows with an implicit prompt."""
    tokenizer = TOKENIZERS["tools"]
    tiny_model(tmp_path / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "model")
    talk = chat("user: q", "assistant: a", "user: r")
    whole = {"chosen": [*talk, *chat("assistant: b")], "rejected": [*talk, *chat("assistant: c")]}
    rows = [
        {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
        {"chosen": "q: 1+1\nA: two", "rejected": "q: 1+1\nA: three"},
        {"prompt": talk, "chosen": chat("assistant: b"), "rejected": chat("assistant: c"), "tools": TOOLS},
        {
            "chosen": [*talk, *chat("assistant: b")],
            "rejected": [*talk, *chat("assistant: c")],
            "tools": json.dumps(TOOLS),
        },
        {"prompt": "r", **whole},
    ]
    trained = build(lines(tmp_path / "pairs.jsonl", rows), tokenizer)
    fed: list[list[int]] = []

    def answer(engine: str, folder: Path, tokenizer: Any, prompts: Any, *more: Any) -> Any:
        fed.extend(prompts)
        return [[generate.Response("b", True)] for _ in prompts]

    monkeypatch.setattr(generate, "generate_by", answer)
    arguments = ["generate", tmp_path / "model", "--prompts", tmp_path / "pairs.jsonl", "--out", tmp_path / "out.jsonl"]
    assert main([str(one) for one in arguments]) == 0
    assert fed == [prompt_of(trained.get(i)) for i in range(len(rows))]
    assert fed[0][0] == tokenizer.bos_token_id and b"weather" in tokenizer.decode(fed[2]).encode()
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written[1]["prompt"] == "q: 1+1\nA:" and written[1]["chosen"] == " two"
    assert [row["prompt"] for row in written[2:]] == [talk] * 3 and written[3]["chosen"] == chat("assistant: b")
    again = build(lines(tmp_path / "again.jsonl", written), tokenizer)  # a file of answers is also a file of pairs
    assert again.fingerprint == trained.fingerprint
    assert main(["evaluate", str(tmp_path / "out.jsonl"), str(tmp_path / "out.jsonl")]) == 0
    sft = [{"messages": [*talk, *chat("assistant: b")]}, {"messages": talk}]
    prompts = [ids for _, _, ids in tokenize_prompts(lines(tmp_path / "sft.jsonl", sft), tokenizer)]
    assert prompts == [prompt_of(tokenize(sft[0], tokenizer))] * 2


@pytest.mark.parametrize("said", [{"content": None}, {}, {"content": ""}, {"content": "one moment"}])
def test_tool_calls_are_those_of_trl(said: dict) -> None:
    tokenizer = TOKENIZERS["tools"]
    calls = {"role": "assistant", **said, "tool_calls": [CALL]}
    row: dict[str, Any] = {
        "tools": TOOLS,
        "prompt": chat("user: q"),
        "chosen": [calls],
        "rejected": chat("assistant: no"),
    }
    theirs = apply_chat_template(row, tokenizer, tools=TOOLS)
    example = tokenize(row, tokenizer)
    assert tokenizer.decode(prompt_of(example)) == theirs["prompt"]
    chosen = tokenizer.decode(example.chosen_ids[example.prompt_length :])
    assert chosen + "\n" == theirs["chosen"] and chosen.endswith('"unit": null}}</call><|eom|>')
    assert tokenizer.decode(example.rejected_ids[example.prompt_length :]) == "no<|im_end|>"
    earlier = {"prompt": [*chat("user: q"), calls, *chat("tool: 7 degrees")], "completion": chat("assistant: 7")}
    assert tokenizer.decode(prompt_of(tokenize(earlier, tokenizer))).endswith("<|im_start|>tool\n7 degrees<|im_end|>\n"
                                                                             "<|im_start|>assistant\n")  # fmt: skip


@pytest.mark.parametrize(
    ("more", "field", "reason"),
    [
        ({"tools": {"name": "f"}}, "tools", "is an object; must be a list of objects"),
        ({"tools": "no JSON"}, "tools", "is a string that is not valid JSON"),
        ({"tools": ["f"]}, "tools", "is a list; must be a list of objects"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs", "is a number; must be an object"),
        ({"chat_template_kwargs": {"thinking": 1}}, "chat_template_kwargs", "sets 'thinking', which the chat templ"),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs",
            "sets 'tokenize', which a row cannot set",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "sets 'messages', which a row cannot set"),
        ({"tools": [{"name": "\ud800"}]}, "tools", "contains an unpaired surrogate"),
        ({"chosen": [{"role": "assistant", "tool_calls": []}]}, "chosen[0].content", "is missing"),
        ({"chosen": [{"role": "assistant", "tool_calls": "f()"}]}, "chosen[0].tool_calls", "is a string; must be a li"),
        (
            {"chosen": [{"role": "assistant", "tool_calls": [{"a": "\udc00"}]}]},
            "chosen[0]",
            "contains an unpaired surrogate",
        ),
        ({"prompt": [{"role": "user", "content": None}]}, "prompt[0].content", "is null"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "tools": TOOLS}, "tools", "requires a chat template"),
    ],
)
def test_what_a_row_cannot_give_the_template(more: dict, field: str, reason: str) -> None:
    row = {"prompt": chat("user: q"), "chosen": chat("assistant: a"), "rejected": chat("assistant: b"), **more}
    with pytest.raises(RowProblem) as caught:
        tokenize(row, TOKENIZERS["tools"])
    assert caught.value.field == field and caught.value.reason.startswith(reason), caught.value
    if "tools" in more:
        with pytest.raises(
            RowProblem, match="sets 'tools', which the chat template does not use|tools: (is|requires|contains)"
        ):
            tokenize(row, TOKENIZERS["plain"])


def test_without_tools_is_an_empty_list_or_null() -> None:
    row = {"prompt": chat("user: q"), "chosen": chat("assistant: a"), "rejected": chat("assistant: b")}
    plain = prompt_of(tokenize(row, TOKENIZERS["tools"]))
    for tools, kwargs in (([], {}), (None, None), ("[]", None)):
        given = {**row, "tools": tools, "chat_template_kwargs": kwargs}
        assert prompt_of(tokenize(given, TOKENIZERS["tools"])) == plain


def test_one_date_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS["the day"]
    row = {"prompt": chat("user: q"), "completion": chat("assistant: a")}
    assert tokenizer.decode(prompt_of(tokenize(row, tokenizer))).startswith("26 July 202426 Jul 2024<|im_start|>user")
    own = {**row, "chat_template_kwargs": {"date_string": "today"}}
    assert tokenizer.decode(prompt_of(tokenize(own, tokenizer))).startswith("26 July 2024today<|im_start|>")
    assert (template_date(tokenizer), template_date(TOKENIZERS["plain"])) == ("2024-07-26", "")
    named = byte_tokenizer(MARKS, template={"default": QWEN_TEMPLATE, "tool_use": TEMPLATES["the day"]})  # type: ignore[arg-type]
    assert template_date(named) == "2024-07-26"


def test_templates_that_render_nothing_usable(tmp_path: Path) -> None:
    row = {"messages": chat("user: q", "assistant: a")}
    for text, error, message in (
        ("{% for m in messages %}", UserError, r"the chat template is not valid Jinja \(line 1: .*data.chat_template"),
        ("{{ '\\ud800' }}", RowProblem, "prompt: as rendered by the chat template, contains an unpaired surrogate"),
        ("{{ messages[5].content }}", RowProblem, "prompt: is rejected by the chat template: .*no element 5"),
        ("{{ 1 / 0 }}", RowProblem, "prompt: is rejected by the chat template: division by zero"),
    ):
        with pytest.raises(error, match=message):
            tokenize(row, byte_tokenizer(MARKS, template=text))


def test_every_command_names_file_line_and_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(tmp_path / "model")
    template = TEMPLATES["system refused, roles renamed, begin-of-sequence in the text"]
    byte_tokenizer(MARKS, bos="<s>", template=template).save_pretrained(tmp_path / "model")
    row = {"prompt": chat("system: s", "user: q"), "chosen": chat("assistant: a"), "rejected": chat("assistant: b")}
    good = {**row, "prompt": chat("user: q")}
    file = lines(tmp_path / "rows.jsonl", [good, "", row])
    (tmp_path / "config.yaml").write_text(
        f"{{output: {tmp_path}/run, model: {{path: {tmp_path}/model}}, data: {{train: {file}, max_length: 64}}, "
        "loss: {name: cpo}}"
    )
    for arguments in (
        ["evaluate", "--model", tmp_path / "model", "--pairs", file],
        ["generate", tmp_path / "model", "--prompts", file, "--out", tmp_path / "out"],
        ["plan", tmp_path / "config.yaml", "--gpus", 1, "--gpu", "h100"],
    ):
        assert main([str(one) for one in arguments]) == 2
        error = capsys.readouterr().err
        assert f"{file} line 3: field 'prompt' is rejected by the chat template: no system role" in error


def test_truncation_keeps_what_the_tokenizer_puts_first() -> None:
    limits = LengthLimits(8, "left", 100)
    row = {"prompt": "0123456789", "chosen": "xyz", "rejected": "x"}
    for tokenizer, prompt in ((byte_tokenizer(bos="<s>"), "<s>789"), (byte_tokenizer(), "6789")):
        example = tokenize(row, tokenizer, limits)
        assert tokenizer.decode(prompt_of(example)) == prompt and len(example.chosen_ids) == 8
    template = "{{ bos_token }}{{ messages[0].content }}{{ messages[1].content }}<eos>"
    template = template.replace("{{ messages[1]", "{% if not add_generation_prompt %}{{ messages[1]") + "{% endif %}"
    tokenizer = byte_tokenizer(bos="<s>", template=template)
    messages = {"prompt": chat("user: 0123456789"), "completion": chat("assistant: xyz")}
    assert tokenizer.decode(prompt_of(tokenize(messages, tokenizer, limits))) == "<s>789"
    with pytest.raises(RowProblem, match="chosen: has 9 tokens"):  # at least one token of the prompt is kept
        tokenize({"prompt": "01", "chosen": "123456", "rejected": "x"}, byte_tokenizer(bos="<s>"), limits)
    assert tokenizer.decode(prompt_of(tokenize({**row, "prompt": ""}, tokenizer, limits))) == "<s>"


def test_the_cache_names_the_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached rows of one date are not used for another date."""
    row = {"prompt": chat("user: q"), "chosen": chat("assistant: a"), "rejected": chat("assistant: b")}
    file = lines(tmp_path / "pairs.jsonl", [row])
    first = build(file, TOKENIZERS["the day"])
    monkeypatch.setattr(chat_template, "DATE", chat_template.DATE.replace(year=2031))
    assert build(file, TOKENIZERS["the day"]).fingerprint != first.fingerprint
