"""Sources, formats and unusable rows: every message names file, line and field; no row is dropped silently."""

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_spo.config.data_source import DataSource
from megatron_spo.config.schema import DataConfig
from megatron_spo.data.dataset import Dropped, TokenizedSet, build_dataset
from megatron_spo.data.loader import Loader, Multiples
from megatron_spo.data.pairs import open_source
from megatron_spo.errors import UserError
from tests.data.helpers import QWEN_TEMPLATE, build, byte_tokenizer, chat, lines, pair

PLAIN = byte_tokenizer()
QWEN = byte_tokenizer(["<|im_start|>", "<|im_end|>"], template=QWEN_TEMPLATE)
GOOD = [pair(), pair("2+2=", "4", "5")]
USER, YES, NO = "user: q", "assistant: yes", "assistant: no"


def responses(data: TokenizedSet, index: int = 0, *, tokenizer: Any = QWEN) -> tuple[str, str, str]:
    example = data.get(index)
    cut = example.prompt_length
    parts = example.chosen_ids[:cut], example.chosen_ids[cut:], example.rejected_ids[cut:]
    return tuple(tokenizer.decode(part) for part in parts)


BAD_ROWS: list[tuple[Any, str, str]] = [
    ({"prompt": "p", "chosen": "c"}, "rejected", "is missing"),
    ({"prompt": "p", "rejected": "c"}, "chosen", "is missing"),
    ({"chosen": "c", "rejected": "d"}, "prompt", "is missing, and"),
    ({"text": "x"}, "chosen", "is missing"),
    (pair(chosen=None), "chosen", "is null; must be"),
    (pair(prompt=None), "prompt", "is null; must be"),
    (pair(rejected=7), "rejected", "is a number; must be a string or a list of messages"),
    (pair(chosen=True), "chosen", "is a boolean"),
    (pair(chosen={"role": "user"}), "chosen", "is an object"),
    (pair(chosen=" \n"), "chosen", "is empty"),
    (pair(prompt=""), "prompt", "is empty"),
    (pair(chosen="<eos>"), "chosen", "is empty after tokenisation"),
    (pair(chosen="3"), "rejected", "equals 'chosen'"),
    (pair(chosen="x", rejected="x<eos>"), "rejected", "equals 'chosen' after tokenisation"),
    (pair(chosen="3" * 90), "chosen", "has 95 tokens with the prompt; data.max_length allows 64"),
    ('{"prompt": "p", "chosen": ', "line", "is not valid JSON"),
    ("[1, 2]", "line", "is a list; must be a JSON object"),
    ('{"prompt": "p", "chosen": "\\ud800", "rejected": "r"}', "chosen", "contains an unpaired surrogate"),
    (pair(chosen=[]), "chosen", "is an empty list"),
    (pair(chosen=["c"]), "chosen[0]", "is a string; must be a message"),
    (pair(chosen=[{"role": "assistant"}]), "chosen[0].content", "is missing"),
    (pair(chosen=[{"role": "assistant", "content": 3}]), "chosen[0].content", "is a number; must be a string"),
    (pair(chosen=chat("assistant:  ")), "chosen[0].content", "is empty"),
    (pair(chosen=chat(YES)), "rejected", "is a string, but the rest of the row is a list of messages"),
    ({"prompt": "p", "chosen": chat(YES), "rejected": chat(NO)}, "prompt", "is a string, but 'chosen' is a list"),
    ({"prompt": chat(USER), "chosen": "c", "rejected": "d"}, "chosen", "is a string, but the rest"),
    ({"prompt": chat(USER), "chosen": chat(USER, YES), "rejected": chat(USER, NO)}, "chosen", "repeats the prompt"),
    ({"prompt": chat(USER, YES), "chosen": chat(YES), "rejected": chat(NO)}, "prompt", "ends with an assistant"),
    ({"chosen": chat(USER, YES), "rejected": chat(USER)}, "rejected", "has no assistant answer"),
    ({"chosen": chat(YES), "rejected": chat(NO)}, "prompt", "is missing, and 'chosen'"),
    ({"chosen": chat(USER, YES, USER), "rejected": chat(USER, NO)}, "chosen", "has a 'user' message"),
]


@pytest.mark.parametrize(("row", "field", "reason"), BAD_ROWS)
def test_bad_row(tmp_path: Path, row: Any, field: str, reason: str) -> None:
    tokenizer = QWEN if "messages" in reason or "[" in json.dumps(row) else PLAIN
    file = lines(tmp_path / "pairs.jsonl", [GOOD[0], row, GOOD[1]])
    with pytest.raises(UserError) as caught:
        build(file, tokenizer, max_length=64)
    message = str(caught.value)
    assert f"{file} line 2: field '{field}' {reason}" in message, message
    assert "data.truncation=left, right or drop" in message if "tokens" in reason else "data.bad_rows=drop" in message
    data = build(file, tokenizer, max_length=64, bad_rows="drop")
    assert len(data) == 2 and [(d.line, d.field) for d in data.dropped] == [(2, field)]
    assert data.dropped[0].reason.startswith(reason) and data.dropped[0].file == str(file)
    assert data.describe(1) == f"{file} line 3"


def test_others_are_counted(tmp_path: Path) -> None:
    bad = pair(chosen=None)
    file = lines(tmp_path / "pairs.jsonl", [GOOD[0], bad, *[bad] * 7])
    with pytest.raises(UserError, match=r"line 2: .*\n7 more such lines: 3, 4, 5, 6, 7, \.\.\.\ncorrect the file"):
        build(file)


def test_overlong_rows_by_truncation(tmp_path: Path) -> None:
    file = lines(tmp_path / "pairs.jsonl", [*GOOD, pair("0123456789", "x", "y"), pair(chosen=None)])
    with pytest.raises(UserError, match="line 3.*\n.*more such lines: 4\nraise the limit"):
        build(file, max_length=8)
    with pytest.raises(UserError, match="line 4: field 'chosen' is null"):
        build(file, max_length=8, truncation="drop")
    dropped = build(file, max_length=8, truncation="drop", bad_rows="drop").dropped
    reason = "has 12 tokens with the prompt; data.max_length allows 8"
    assert dropped[0] == Dropped(str(file), 3, "chosen", reason) and len(dropped) == 2
    cut = build(file, max_length=8, truncation="left", bad_rows="drop")
    assert responses(cut, 2, tokenizer=PLAIN) == ("456789", "x<eos>", "y<eos>") and len(cut.dropped) == 1


def test_every_row_dropped(tmp_path: Path) -> None:
    file = lines(tmp_path / "pairs.jsonl", [pair(chosen=None)] * 2)
    with pytest.raises(UserError, match="none of the 2 rows of .*pairs.jsonl can be used; first problem: .* line 1"):
        build(file, bad_rows="drop")
    with pytest.raises(UserError, match="there are no rows"):
        build(lines(tmp_path / "blank.jsonl", ["", "  "]))


def test_unreadable_sources(tmp_path: Path) -> None:
    cases = {
        "nothing.jsonl": (None, "nothing.jsonl does not exist"),
        "nothing.parquet": (None, "nothing.parquet does not exist"),
        "empty.jsonl": (b"", "empty.jsonl is empty"),
        "array.json": (b'[{"prompt": "p"}]', "is a JSON array; write one JSON object per line"),
        "pairs.csv": (b"prompt,chosen\n", "has the unsupported extension '.csv'"),
        "pairs.parquet": (b"not parquet", "pairs.parquet is not a readable Parquet file"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            build(tmp_path / name)
    with pytest.raises(UserError, match="is a folder, but not one written by save_to_disk; set a .jsonl"):
        open_source(DataSource(path=str(tmp_path)))
    lines(tmp_path / "latin.jsonl", []).write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(UserError, match="line 1: field 'line' is not UTF-8"):
        build(tmp_path / "latin.jsonl")


def test_hub_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like common binarised data sets: a prompt string, whole conversations, and other columns."""
    import datasets

    def load(path: str, *, split: str) -> datasets.Dataset:
        assert (path, split) == ("somebody/pairs", "test")
        rows = [{"prompt": "q", "chosen": chat(USER, YES), "rejected": chat(USER, NO), "score": 1.0}]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    data = build([DataSource(path="somebody/pairs", split="test")], QWEN)
    assert responses(data)[1:] == ("yes<|im_end|>", "no<|im_end|>")
    assert data.describe(0) == "somebody/pairs (test) row 1"


def test_line_numbers_with_blank_lines_and_odd_separators(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    odd = json.dumps(pair(prompt="a\u2028b\x85c\x0cd"), ensure_ascii=False)
    bad = json.dumps(pair(chosen=None))
    text = "\ufeff" + json.dumps(GOOD[0]) + "\r\n\n   \n" + odd + "\n" + bad + "\n\n" + json.dumps(GOOD[1])
    file.write_bytes(text.encode())
    data = build(file, bad_rows="drop")
    assert [data.describe(i) for i in range(3)] == [f"{file} line {line}" for line in (1, 4, 7)]
    assert [d.line for d in data.dropped] == [5]
    assert responses(data, 1, tokenizer=PLAIN)[0] == "a\u2028b\x85c\x0cd"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": chat(USER), "chosen": chat(YES), "rejected": chat(NO)},
        {"chosen": chat(USER, YES), "rejected": chat(USER, NO)},
        {"prompt": "q", "chosen": chat(USER, YES), "rejected": chat(USER, NO)},
    ],
)
def test_message_formats_agree(tmp_path: Path, row: dict) -> None:
    jsonl = build(lines(tmp_path / "pairs.jsonl", [row]), QWEN)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "pairs.parquet")
    parquet = build(tmp_path / "pairs.parquet", QWEN)
    wanted = ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "yes<|im_end|>", "no<|im_end|>")
    assert responses(jsonl) == responses(parquet) == wanted
    assert jsonl.fingerprint == parquet.fingerprint
    assert parquet.describe(0).endswith("pairs.parquet row 1")


def test_a_null_in_parquet_is_an_absent_key(tmp_path: Path) -> None:
    """Arrow gives all rows, messages and tools the union of their keys; null values in JSON are kept."""
    tools = "{% if tools %}{{ tools | tojson }}{% endif %}"
    tools += "{% for m in messages if m.name is defined %}{{ m.name }}{% endfor %}"
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>"], template=tools + QWEN_TEMPLATE)
    named = [{**chat(USER)[0], "name": "ann"}]
    rows: list[dict[str, Any]] = [
        {"prompt": named, "chosen": chat(YES), "rejected": chat(NO), "tools": [{"name": "f", "city": {"type": "x"}}]},
        {"prompt": chat(USER), "chosen": chat(YES), "rejected": chat(NO), "tools": [{"name": "g"}]},
        {"chosen": chat(USER, YES), "rejected": chat(USER, NO)},
    ]
    jsonl = build(lines(tmp_path / "pairs.jsonl", rows), tokenizer)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    parquet = build(tmp_path / "pairs.parquet", tokenizer)
    assert parquet.fingerprint == jsonl.fingerprint and "null" not in responses(parquet)[0]
    assert responses(parquet, 1)[0].startswith('[{"name": "g"}]<|im_start|>user')
    with pytest.raises(UserError, match="line 1: field 'prompt' is null"):
        build(lines(tmp_path / "null.jsonl", [{**rows[2], "prompt": None}]), tokenizer)
    kept = build(lines(tmp_path / "kept.jsonl", [{**rows[1], "tools": [{"name": None}]}]), tokenizer)
    assert responses(kept)[0].startswith('[{"name": null}]')


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    import datasets

    jsonl = build(lines(tmp_path / "pairs.jsonl", GOOD))
    table = datasets.Dataset.from_list(GOOD)
    table.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "both")
    one = build(tmp_path / "one")
    assert one.fingerprint == jsonl.fingerprint and one.describe(1) == f"{tmp_path / 'one'} row 2"
    test = build([DataSource(path=str(tmp_path / "both"), split="test")])
    assert len(test) == 1 and test.describe(0) == f"{tmp_path / 'both'} (test) row 1"
    with pytest.raises(UserError, match="both has no split 'dev'; set split of the source"):
        build([DataSource(path=str(tmp_path / "both"), split="dev")])
    shard = next((tmp_path / "one").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(UserError, match="one is not a readable data set folder"):
        build(tmp_path / "one")
    (tmp_path / "one/state.json").write_text("{")
    with pytest.raises(UserError, match="one is not a readable data set folder"):
        build(tmp_path / "one")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_useless_tokenizer_stops_at_once(tmp_path: Path, num_proc: int) -> None:
    row = {"prompt": chat(USER), "chosen": chat(YES), "rejected": chat(NO)}
    file = lines(tmp_path / "pairs.jsonl", [row, row])
    with pytest.raises(UserError, match="set data.chat_template to a template file"):
        build(file, PLAIN, num_proc=num_proc, bad_rows="drop")
    no_eos = byte_tokenizer()
    no_eos.eos_token = None
    with pytest.raises(UserError, match="has no eos_token"):
        build(lines(tmp_path / "strings.jsonl", GOOD), no_eos, num_proc=num_proc)
    assert not list((tmp_path / "cache").glob("*.*/")), "work folders are removed"


def test_sft_sets(tmp_path: Path) -> None:
    rows = [{"prompt": "q:", "completion": "x"}, {"prompt": "r", "completion": "yz"}]
    data = build(lines(tmp_path / "sft.jsonl", rows), kind="any")
    assert not data.has_rejected and data.rejected_tokens.tolist() == [0, 0]
    assert data.tokens.tolist() == [4, 4] and data.chosen_tokens.tolist() == [2, 3]
    assert build(lines(tmp_path / "pairs.jsonl", GOOD), kind="any").has_rejected
    with pytest.raises(UserError, match="line 1: field 'chosen' is missing"):
        build(tmp_path / "sft.jsonl")
    with pytest.raises(
        UserError, match=r"mixed.jsonl line 1 is a preference pair, but .*mixed.jsonl line 2 is an SFT row"
    ):
        build(lines(tmp_path / "mixed.jsonl", [GOOD[0], rows[0]]), kind="any")
    for row, field in [({"messages": chat(USER)}, "messages"), ({"completion": "x"}, "prompt")]:
        with pytest.raises(UserError, match=f"field '{field}'"):
            build(lines(tmp_path / "bad.jsonl", [row]), QWEN, kind="any")


def test_columns_and_fingerprint(tmp_path: Path) -> None:
    rows = [pair(str(i), "x" * (1 + i % 3), "y" * (1 + i % 5)) for i in range(20)]
    data = build(lines(tmp_path / "a.jsonl", rows))
    examples = [data.get(i) for i in range(len(data))]
    assert data.tokens.tolist() == [len(e.chosen_ids) + len(e.rejected_ids) - e.shared for e in examples]
    assert data.chosen_tokens.tolist() == [len(e.chosen_ids) - e.prompt_length for e in examples]
    assert data.rejected_tokens.tolist() == [len(e.rejected_ids) - e.prompt_length for e in examples]
    assert len(set(data.row_hashes.tolist())) == 20 and data.row_hashes.dtype == np.uint64
    same = build(lines(tmp_path / "b.jsonl", ["", *rows]), num_proc=2)
    turned = build(lines(tmp_path / "c.jsonl", rows[::-1]))
    moved = build(lines(tmp_path / "d.jsonl", [pair("0x", "", "y"), *rows[1:]]), bad_rows="drop")
    assert same.fingerprint == data.fingerprint
    assert len({data.fingerprint, turned.fingerprint, moved.fingerprint}) == 3
    with pytest.raises(IndexError):
        data.get(20)


def test_several_sources(tmp_path: Path) -> None:
    files = [lines(tmp_path / "a.jsonl", [GOOD[0], pair(chosen=None)]), lines(tmp_path / "b.jsonl", GOOD)]
    sources = [DataSource(path=str(files[0]), weight=2.0), DataSource(path=str(files[1]), weight=0.5)]
    data = build(sources, bad_rows="drop")
    assert data.source_sizes == (1, 2) and data.weights == (2.0, 0.5) and data.source.tolist() == [0, 1, 1]
    assert [data.describe(i) for i in range(3)] == [f"{files[0]} line 1", f"{files[1]} line 1", f"{files[1]} line 2"]
    assert [d.file for d in data.dropped] == [str(files[0])]


def test_tokenised_rows_are_kept_and_belong_to_what_made_them(tmp_path: Path) -> None:
    file, cache = lines(tmp_path / "a.jsonl", GOOD), tmp_path / "cache"
    first = build(file)
    folders = {path.name: path.stat().st_mtime_ns for path in cache.glob("*/index.json")}
    assert len(list(cache.glob("*/index.json"))) == 1
    copied = tmp_path / "copy.jsonl"
    shutil.copy(file, copied)
    assert build(copied, bad_rows="drop", num_proc=2).fingerprint == first.fingerprint
    assert {path.name: path.stat().st_mtime_ns for path in cache.glob("*/index.json")} == folders
    for change in ({"max_length": 100}, {"truncation": "left"}, {"row_length": 100}):
        build(file, **change)
    build(file, QWEN)
    build(lines(file, [*GOOD, pair("3+3=", "6", "7")]))
    assert len(list(cache.glob("*/index.json"))) == 6
    assert not list(cache.glob("*.*/index.json")), "work folders are removed"


def _build_in_process(file: str, results: Any) -> None:
    results.put(build(Path(file)).fingerprint)


@pytest.mark.slow
def test_many_processes_build_at_once(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", [pair(str(i), "x" * (i % 7 + 1), "y") for i in range(2000)])
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_build_in_process, args=(str(file), results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    fingerprints = {results.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert fingerprints == {build(file).fingerprint}
    assert len(list((tmp_path / "cache").glob("*/index.json"))) == 1


def test_loader(tmp_path: Path) -> None:
    rows = [pair(str(i), "x" * (1 + i % 7), "y" * (1 + i % 5)) for i in range(30)]
    file = lines(tmp_path / "a.jsonl", rows)
    data, config = build(file), DataConfig(train=[DataSource(path=str(file))], max_length=16, row_length=40)
    ranks = [
        Loader(data, config, global_batch_size=8, seed=1, rank=r, ranks=2, multiples=Multiples(tokens=4))
        for r in range(2)
    ]
    assert ranks[0].steps_per_epoch == 4
    seen: list[int] = []
    for step in range(4):
        batches = [loader.batch(step) for loader in ranks]
        assert len(batches[0].rows) == len(batches[1].rows) and batches[0].step == step
        assert batches[0].indices.tolist() == batches[1].indices.tolist()
        packed = [int(i) for batch in batches for row in batch.rows for i in row.pairs]
        assert sorted(packed) == sorted(batches[0].indices.tolist())
        all_rows = [row for batch in batches for row in batch.rows]
        assert all(len(row.tokens) % 4 == 0 and row.real_tokens <= 40 for row in all_rows)
        assert batches[0].tokens == sum(row.real_tokens for row in all_rows)
        assert batches[0].chosen_tokens == sum(row.chosen_tokens.sum() for row in all_rows)
        assert batches[0].rejected_tokens == sum(row.rejected_tokens.sum() for row in all_rows)
        assert batches[0].pairs == len(packed)
        seen += packed
    assert sorted(seen) == list(range(30))
    one = Loader(data, config, global_batch_size=8, seed=1)
    assert one.batch(2).indices.tolist() == ranks[0].batch(2).indices.tolist()
    covered = [batch.indices.tolist() for batch in ranks[0].eval_batches()]
    assert sum(covered, []) == list(range(30)) and len(covered[-1]) == 6


def test_a_smaller_draw_is_contained_in_a_larger_one(tmp_path: Path) -> None:
    files = [lines(tmp_path / f"{name}.jsonl", [pair(f"{name}{i}=") for i in range(20)]) for name in "ab"]
    data = build_dataset(
        [DataSource(path=str(file)) for file in files], DataConfig(train=[DataSource(path="a")]), PLAIN
    )

    def places(rows: int, seed: int) -> list[str]:
        drawn = data.drawn(rows, seed)
        assert len(drawn) == rows == sum(drawn.source_sizes)
        assert all(drawn.get(i).chosen_ids.tolist() in whole for i in range(rows))
        return [drawn.describe(i) for i in range(rows)]

    whole = [data.get(i).chosen_ids.tolist() for i in range(40)]
    every = [data.describe(i) for i in range(40)]
    small, large = places(10, 0), places(25, 0)
    assert set(small) < set(large)
    assert [place for place in every if place in large] == large  # in the order of the files
    assert all(any(str(file) in place for place in small) for file in files)
    assert set(places(10, 1)) != set(small)
    assert data.drawn(40, 0).fingerprint == data.fingerprint != data.drawn(39, 0).fingerprint
    assert data.drawn(10, 0).get(3).chosen_ids.tolist() == whole[every.index(small[3])]
    with pytest.raises(UserError, match=r"data.rows = 41, but .*b.jsonl has 40 usable rows"):
        data.drawn(41, 0)
