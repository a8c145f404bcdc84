"""Prompt tokens are a prefix of prompt + response; the end-of-turn token is a response token exactly once."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megatron_spo.data.pairs import RowProblem, parse_row
from megatron_spo.data.rows import Example
from megatron_spo.data.tokenize import LengthLimits, RowTokenizer, load_tokenizer, tokenizer_fingerprint
from megatron_spo.errors import UserError
from tests.data.helpers import QWEN_TEMPLATE, byte_tokenizer, chat, metaspace_tokenizer, pair
from tests.support.tiny import tiny_tokenizer

PLAIN = byte_tokenizer()
BOTH_ENDS = byte_tokenizer(bos="<s>", add_eos=True)
QWEN = byte_tokenizer(["<|im_start|>", "<|im_end|>"], template=QWEN_TEMPLATE)


def tokenize(
    row: dict, tokenizer: PreTrainedTokenizerFast, *, length: int = 1000, cut: str | None = None, row_length: int = 2000
) -> Example:
    rows = RowTokenizer(tokenizer, LengthLimits(length, cut, row_length))
    return rows.tokenize(parse_row(row, kind="preference" if "chosen" in row else "any"))


def texts(example: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str, str]:
    """Returns (prompt, chosen, rejected) as text."""
    cut = example.prompt_length
    parts = example.chosen_ids[:cut], example.chosen_ids[cut:], example.rejected_ids[cut:]
    prompt, chosen, rejected = (str(tokenizer.decode(part)) for part in parts)
    return prompt, chosen, rejected


def check(example: Example, *, end: int) -> None:
    """Checks the invariants of every tokenised row."""
    prompt = example.prompt_length
    sides = [example.chosen_ids, *([example.rejected_ids] if len(example.rejected_ids) else [])]
    for side in sides:
        assert side[:prompt].tolist() == example.chosen_ids[:prompt].tolist()
        assert len(side) >= prompt + 2 and side[-1] == end and side[-2] != end
    assert 1 <= prompt <= example.shared <= min(len(side) for side in sides)
    assert len({tuple(side[: example.shared].tolist()) for side in sides}) == 1
    if len(sides) == 2 and example.shared < min(map(len, sides)):
        assert sides[0][example.shared] != sides[1][example.shared]


# Letters that merge across the border ("a" + "b", ":" + "x"), special tokens in the text, other bytes.
text = st.text(st.sampled_from("ab:x \né😀"), max_size=8)
ended = st.tuples(text, st.sampled_from(["", "<eos>", "<eos><eos>"])).map("".join)


@given(text, ended, ended, st.sampled_from([PLAIN, BOTH_ENDS]))
@settings(deadline=None)
def test_invariants_of_string_rows(prompt: str, chosen: str, rejected: str, tokenizer: PreTrainedTokenizerFast) -> None:
    try:
        example = tokenize(pair(prompt, chosen, rejected), tokenizer)
    except RowProblem as problem:
        assert problem.field in ("prompt", "chosen", "rejected")
        bare = chosen.replace("<eos>", ""), rejected.replace("<eos>", "")
        assert not bare[0].strip() or not bare[1].strip() or bare[0] == bare[1] or not prompt
        return
    check(example, end=tokenizer.eos_token_id)
    bos = "<s>" if tokenizer is BOTH_ENDS else ""
    whole = [bos + prompt + answer.replace("<eos>", "") + "<eos>" for answer in (chosen, rejected)]
    assert [tokenizer.decode(ids) for ids in (example.chosen_ids, example.rejected_ids)] == whole
    assert example.chosen_ids.tolist().count(tokenizer.eos_token_id) == 1
    assert example.chosen_ids.tolist().count(tokenizer.bos_token_id) == (1 if bos else 0)


@given(st.lists(text.filter(str.strip), min_size=1, max_size=3), text, text)
@settings(deadline=None)
def test_invariants_of_message_rows(turns: list[str], chosen: str, rejected: str) -> None:
    roles = ["user", "assistant"] * 2
    prompt = [{"role": roles[i], "content": turn} for i, turn in enumerate(turns)]
    row = {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    try:
        example = tokenize(row, QWEN)
    except RowProblem:
        assert not chosen.strip() or not rejected.strip() or chosen == rejected or len(turns) == 2
        return
    end: Any = QWEN.convert_tokens_to_ids("<|im_end|>")
    check(example, end=end)
    assert texts(example, QWEN)[1:] == (chosen + "<|im_end|>", rejected + "<|im_end|>")
    assert texts(example, QWEN)[0].endswith("<|im_start|>assistant\n")


def test_message_rows_equal_the_whole_conversation_rendered_at_once() -> None:
    row = {"prompt": chat("system: s", "user: ab :x"), "completion": chat("assistant: a b")}
    whole: Any = QWEN.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)
    assert [*tokenize(row, QWEN).chosen_ids.tolist(), *QWEN.encode("\n")] == whole["input_ids"]


def test_tokens_do_not_depend_on_the_day() -> None:
    today = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>"], template=today + "{{ date_string }}" + QWEN_TEMPLATE)
    example = tokenize({"messages": chat("user: q", "assistant: a")}, tokenizer)
    assert texts(example, tokenizer)[0].startswith("26 Jul 2024<|im_start|>")


def test_merges_across_the_border_are_undone() -> None:
    example = tokenize(pair("a", "b", "x"), PLAIN)  # alone "ab" is one token
    assert texts(example, PLAIN) == ("a", "b<eos>", "x<eos>")
    assert PLAIN.decode(example.chosen_ids) == "ab<eos>"


def test_no_space_slips_in_where_the_tokenizer_would_add_one() -> None:
    tokenizer = metaspace_tokenizer()
    assert tokenizer.tokenize("1") == ["▁", "1"] and tokenizer.tokenize("a=1") == ["▁", "a", "=1"]
    example = tokenize(pair("a=", "1", "2"), tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(example.chosen_ids.tolist())
    assert tokens == ["▁", "a", "=", "1", "<eos>"] and example.prompt_length == 3


def test_begin_of_sequence_once_even_if_the_text_has_it() -> None:
    example = tokenize(pair("<s>q", "x", "y"), BOTH_ENDS)
    assert texts(example, BOTH_ENDS) == ("<s>q", "x<eos>", "y<eos>")
    with_empty_prompt = tokenize(pair("", "x", "y"), BOTH_ENDS)
    assert texts(with_empty_prompt, BOTH_ENDS)[0] == "<s>"
    with pytest.raises(RowProblem, match="prompt: is empty"):
        tokenize(pair("", "x", "y"), PLAIN)


@pytest.mark.parametrize("content", ["hi", "hi<|im_end|>", "end", "a\n", "im_end"])
def test_white_space_after_the_end_of_turn_is_not_scored(content: str) -> None:
    row = {"prompt": chat("user: q"), "chosen": chat(f"assistant: {content}"), "rejected": chat("assistant: no")}
    example = tokenize(row, QWEN)
    assert texts(example, QWEN)[1] == content.removesuffix("<|im_end|>") + "<|im_end|>"


def test_first_of_several_end_tokens_ends_the_response() -> None:
    template = QWEN_TEMPLATE + "{% if not add_generation_prompt %}<eos>{% endif %}"  # like Phi-3
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>"], template=template)
    row = {"prompt": chat("user: q"), "completion": chat("assistant: yes")}
    assert texts(tokenize(row, tokenizer), tokenizer)[1] == "yes<|im_end|>"


def test_special_token_inside_the_content_does_not_end_it() -> None:
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>", "<img>"], template=QWEN_TEMPLATE)
    row = {"prompt": chat("user: q"), "completion": chat("assistant: see <img>")}
    assert texts(tokenize(row, tokenizer), tokenizer)[1] == "see <img><|im_end|>"


def test_template_without_end_token_gets_eos() -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501
    tokenizer = byte_tokenizer(template=template)
    row = {"prompt": chat("user: q"), "chosen": chat("assistant: a"), "rejected": chat("assistant: b")}
    assert texts(tokenize(row, tokenizer), tokenizer) == ("user: q\nassistant: ", "a\n<eos>", "b\n<eos>")


def test_template_that_changes_the_prompt_is_refused() -> None:
    template = QWEN_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>"], template=template)
    row = {"prompt": chat("user: q"), "chosen": chat("assistant: a"), "rejected": chat("assistant: b")}
    with pytest.raises(RowProblem, match="chosen: the chat template renders the prompt differently.*'<think>"):
        tokenize(row, tokenizer)


def test_template_that_refuses_a_row_is_named() -> None:
    tokenizer = byte_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    row = {"messages": chat("user: q", "assistant: a")}
    with pytest.raises(RowProblem, match="prompt: is rejected by the chat template: roles must alternate"):
        tokenize(row, tokenizer)
    with pytest.raises(UserError, match="no chat template; set data.chat_template to a template file"):
        tokenize(row, PLAIN)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: 1+1\nA: two", "Q: 1+1\nA: three", "Q: 1+1\nA:"),  # the space belongs to the answers
        ("Q unhappy", "Q unkind", "Q"),  # not inside a word
        ("unhappy", "unkind", None),  # only a part of a word in common
        ("q<|a|>x", "q<|b|>y", "q"),  # not inside a special token
        ("q:xa", "q:b", "q"),  # ":x" is one token
        ("q 😀", "q 😃", "q"),  # two characters that begin with the same bytes
        ("x", "y", None),
    ],
)
def test_implicit_string_prompt(chosen: str, rejected: str, prompt: str | None) -> None:
    tokenizer = byte_tokenizer(["<|a|>", "<|b|>"])
    row = {"chosen": chosen, "rejected": rejected}
    if prompt is None:
        with pytest.raises(RowProblem, match="prompt: is missing"):
            tokenize(row, tokenizer)
        return
    example = tokenize(row, tokenizer)
    answers = chosen.removeprefix(prompt) + "<eos>", rejected.removeprefix(prompt) + "<eos>"
    assert texts(example, tokenizer) == (prompt, *answers)


def test_truncation() -> None:
    row = pair("0123456789", "abcdefg", "xy")  # with ends: 10, 7 ("ab" is one token), 3
    assert texts(tokenize(row, PLAIN, length=17), PLAIN)[0] == "0123456789"
    with pytest.raises(RowProblem, match="chosen: has 17 tokens with the prompt; data.max_length allows 16"):
        tokenize(row, PLAIN, length=16)
    assert texts(tokenize(row, PLAIN, length=12, cut="left"), PLAIN) == ("56789", "abcdefg<eos>", "xy<eos>")
    assert texts(tokenize(row, PLAIN, length=8, cut="left"), PLAIN)[0] == "9"
    with pytest.raises(RowProblem, match="chosen: has 8 tokens"):
        tokenize(row, PLAIN, length=7, cut="left")
    assert texts(tokenize(row, PLAIN, length=12, cut="right"), PLAIN)[1:] == ("abc", "xy")
    with pytest.raises(RowProblem, match="chosen: has 11 tokens"):
        tokenize(row, PLAIN, length=10, cut="right")
    with pytest.raises(RowProblem, match="rejected: equals 'chosen' after tokenisation and truncation"):
        tokenize(pair("0123", "xyz", "xya"), PLAIN, length=6, cut="right")
    with pytest.raises(RowProblem, match="rejected: the pair packs into 20 tokens; data.row_length allows 19"):
        tokenize(row, PLAIN, row_length=19)
    start_of_the_other = tokenize(pair("0", "x", "x<eos>y"), PLAIN)
    assert start_of_the_other.shared == len(start_of_the_other.chosen_ids) == 3


def test_sft_rows() -> None:
    example = tokenize({"prompt": "q:", "completion": " x"}, PLAIN)
    assert texts(example, PLAIN) == ("q:", " x<eos>", "")
    assert example.shared == len(example.chosen_ids)
    several = tokenize({"messages": chat("user: q", "assistant: a", "user: r", "assistant: b")}, QWEN)
    assert texts(several, QWEN)[1] == "b<|im_end|>"
    assert "a<|im_end|>" in texts(several, QWEN)[0]


def test_load_tokenizer(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "plain")
    template = tmp_path / "template.jinja"
    template.write_text(QWEN_TEMPLATE)
    tokenizer = load_tokenizer(str(tmp_path / "plain"), str(template))
    assert tokenizer.chat_template == QWEN_TEMPLATE
    with pytest.raises(UserError, match="data.chat_template: file .*nothing does not exist"):
        load_tokenizer(str(tmp_path / "plain"), str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty contains no tokenizer"):
        load_tokenizer(str(tmp_path / "empty"))
    (tmp_path / "empty/tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot load a tokenizer from"):
        load_tokenizer(str(tmp_path / "empty"))


def test_a_stored_length_limit_does_not_cut() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert texts(tokenize(pair("0123456789", "x", "y"), tokenizer), tokenizer)[0] == "0123456789"


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "a")
    tiny_tokenizer(tmp_path / "b")
    tiny_tokenizer(tmp_path / "c", chat=True)
    a, b, c = (load_tokenizer(str(tmp_path / name)) for name in "abc")
    assert tokenizer_fingerprint(a) == tokenizer_fingerprint(b) != tokenizer_fingerprint(c)
    before = tokenizer_fingerprint(a)
    a("text", truncation=True, max_length=2)  # a temporary setting, not content
    assert tokenizer_fingerprint(a) == before
    b.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(b) != before
