"""The reference cache: incomplete or stale caches are rejected with what differs and the command that fixes it."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_spo.data.dataset import TokenizedSet
from megatron_spo.errors import UserError
from megatron_spo.reference.cache import (
    RECORD,
    ReferenceFingerprint,
    ReferenceStore,
    ReferenceWriter,
    cache_folder,
    open_reference,
)
from tests.data.helpers import build, lines, pair

COUNT, CHUNK = 50, 8
CHOSEN = -np.arange(1, COUNT + 1, dtype=np.float32) / 3
REJECTED = -np.arange(1, COUNT + 1, dtype=np.float32) / 7


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenizedSet:
    rows = [pair(str(i), "x" * (1 + i % 7), "y" * (1 + i % 5)) for i in range(COUNT)]
    return build(lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows))


def fingerprint(data: TokenizedSet) -> ReferenceFingerprint:
    return ReferenceFingerprint("weights-a", "tokenizer-a", "error at 64 tokens", "bf16", data.fingerprint)


def writer(cache: Path, data: TokenizedSet, **changes: str) -> ReferenceWriter:
    return ReferenceWriter.open(cache, "train", replace(fingerprint(data), **changes), data, chunk=CHUNK)


def write(writer: ReferenceWriter, chunks: list[int]) -> None:
    for k in chunks:
        indices = writer.chunk_indices(k)
        writer.write_chunk(k, CHOSEN[indices], REJECTED[indices])


def fill(cache: Path, data: TokenizedSet, **changes: str) -> Path:
    filling = writer(cache, data, **changes)
    write(filling, filling.missing_chunks())
    filling.finish()
    return cache_folder(cache, "train", fingerprint(data))


def opened(cache: Path, data: TokenizedSet) -> ReferenceStore:
    return open_reference(cache, "train", fingerprint(data), data)


def refusal(cache: Path, data: TokenizedSet) -> str:
    with pytest.raises(UserError) as caught:
        opened(cache, data)
    assert "run: megatron-spo reference CONFIG.yaml" in str(caught.value)
    return str(caught.value)


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_fill_and_read(tmp_path: Path, data: TokenizedSet) -> None:
    folder = fill(tmp_path, data)
    assert folder.name == f"train-{data.fingerprint[:12]}"
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "records.npy"]
    store = opened(tmp_path, data)
    indices = np.array([3, 49, 0, 3])
    chosen, rejected = store.get(indices)
    assert chosen.dtype == rejected.dtype == np.float32
    assert (chosen == CHOSEN[indices]).all() and (rejected == REJECTED[indices]).all()
    assert len(store) == COUNT
    records = np.load(folder / "records.npy")
    assert records.dtype == RECORD and RECORD.itemsize == 16
    assert (records["row_hash"] == data.row_hashes).all()


def test_second_call_does_nothing(tmp_path: Path, data: TokenizedSet) -> None:
    folder = fill(tmp_path, data)
    before = content(folder)
    again = writer(tmp_path, data)
    assert again.complete and again.missing_chunks() == []
    again.finish()
    assert content(folder) == before


def test_goes_on_where_it_stopped(tmp_path: Path, data: TokenizedSet) -> None:
    first = writer(tmp_path, data)
    assert first.missing_chunks() == list(range(7)) and first.chunk_indices(6).tolist() == [48, 49]
    write(first, [0, 3, 6])
    assert "is incomplete: it has 18 of 50 pairs" in refusal(tmp_path, data)
    second = writer(tmp_path, data)
    assert second.missing_chunks() == [1, 2, 4, 5]
    with pytest.raises(UserError, match="is incomplete: it has 18 of 50 pairs; run: megatron-spo reference"):
        second.finish()
    write(second, [1, 2, 4, 5])
    second.finish()
    assert (opened(tmp_path, data).get(np.arange(COUNT))[0] == CHOSEN).all()


def _write_until_killed(cache: str, rows: str, started: object) -> None:
    data = build(Path(rows))
    filling = writer(Path(cache), data)
    write(filling, [0, 1])
    started.set()  # type: ignore[attr-defined]
    while True:
        write(filling, [2])


@pytest.mark.slow
def test_killed_while_writing(tmp_path: Path) -> None:
    rows = [pair(str(i), "x" * (1 + i % 7), "y" * (1 + i % 5)) for i in range(COUNT)]
    file = lines(tmp_path / "pairs.jsonl", rows)
    data, context = build(file), multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=_write_until_killed, args=(str(tmp_path / "cache"), str(file), started))
    process.start()
    assert started.wait(60)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    missing = writer(tmp_path / "cache", data).missing_chunks()
    assert missing in ([2, 3, 4, 5, 6], [3, 4, 5, 6])
    folder = fill(tmp_path / "cache", data)
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "records.npy"]
    assert (opened(tmp_path / "cache", data).get(np.arange(COUNT))[0] == CHOSEN).all()


@pytest.mark.parametrize("damage", ["shorter", "longer", "flipped", "empty", "foreign chunk"])
def test_torn_part_is_written_again(tmp_path: Path, data: TokenizedSet, damage: str) -> None:
    filling = writer(tmp_path, data)
    write(filling, list(range(7)))
    part = sorted((cache_folder(tmp_path, "train", fingerprint(data)) / "parts").iterdir())[2]
    whole = part.read_bytes()
    torn = {
        "shorter": whole[:-1],
        "longer": whole + b"\0",
        "flipped": whole[:50] + bytes([whole[50] ^ 1]) + whole[51:],
        "empty": b"",
        "foreign chunk": (part.parent / "00000003.part").read_bytes(),
    }
    part.write_bytes(torn[damage])
    assert writer(tmp_path, data).missing_chunks() == [2]
    fill(tmp_path, data)
    assert (opened(tmp_path, data).get([16])[0] == CHOSEN[16]).all()


def test_parts_of_another_model_or_chunk_size_do_not_count(tmp_path: Path, data: TokenizedSet) -> None:
    write(writer(tmp_path, data), [0, 1, 2])
    assert writer(tmp_path, data, weights="weights-b").missing_chunks() == list(range(7))
    other = ReferenceWriter.open(tmp_path, "train", fingerprint(data), data, chunk=CHUNK + 1)
    assert other.missing_chunks() == list(range(6))
    fill(tmp_path, data)


def test_killed_before_the_index(tmp_path: Path, data: TokenizedSet) -> None:
    """records.npy of a new model with the index of the old one is damage; the parts still exist."""
    folder = fill(tmp_path, data, weights="weights-old")
    index = (folder / "index.json").read_bytes()
    filling = writer(tmp_path, data)
    for k in filling.missing_chunks():
        indices = filling.chunk_indices(k)
        filling.write_chunk(k, CHOSEN[indices] - 1, REJECTED[indices])
    filling.finish()
    (folder / "index.json").write_bytes(index)
    with pytest.raises(UserError, match="checksum"):
        open_reference(tmp_path, "train", replace(fingerprint(data), weights="weights-old"), data)
    assert not writer(tmp_path, data, weights="weights-old").complete
    fill(tmp_path, data)
    opened(tmp_path, data)


def test_missing(tmp_path: Path, data: TokenizedSet) -> None:
    assert "there is no reference cache for 'train' in" in refusal(tmp_path, data)
    assert "there is no reference cache for 'train' in" in refusal(tmp_path / "nowhere", data)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("weights", "the reference's weights"),
        ("tokenizer", "the tokenizer or its chat template"),
        ("truncation", "truncation"),
        ("precision", "precision"),
        ("date", "the date given to the chat template"),
    ],
)
def test_stale_names_the_part_that_differs(tmp_path: Path, data: TokenizedSet, part: str, name: str) -> None:
    fill(tmp_path, data, **{part: "older"})
    message = refusal(tmp_path, data)
    assert "is stale" in message
    assert f"{name}: the cache has 'older', this run has '{getattr(fingerprint(data), part)}'" in message
    assert message.count("the cache has") == 1
    fill(tmp_path, data)  # the command in the message fixes it
    opened(tmp_path, data)


def test_a_cache_that_records_no_date_serves_templates_that_ask_for_none(tmp_path: Path, data: TokenizedSet) -> None:
    index = fill(tmp_path, data) / "index.json"
    content = json.loads(index.read_text())
    assert content["fingerprint"].pop("date") == ""
    index.write_text(json.dumps(content))
    assert len(opened(tmp_path, data)) == COUNT
    with pytest.raises(
        UserError, match="the date given to the chat template: the cache has '', this run has '2024-07-26'"
    ):
        open_reference(tmp_path, "train", replace(fingerprint(data), date="2024-07-26"), data)


def test_stale_cache_stays_until_its_successor_is_whole(tmp_path: Path, data: TokenizedSet) -> None:
    fill(tmp_path, data, weights="older")
    write(writer(tmp_path, data), [0, 1])
    assert "is stale" in refusal(tmp_path, data)
    open_reference(tmp_path, "train", replace(fingerprint(data), weights="older"), data)


def test_other_rows(tmp_path: Path, data: TokenizedSet) -> None:
    fill(tmp_path, data)
    other = build(lines(tmp_path / "other.jsonl", [pair(), pair("2+2=", "4", "5")]))
    message = refusal(tmp_path, other)
    assert f"the data set's rows: the cache has '{data.fingerprint}', this run has '{other.fingerprint}'" in message
    assert "tokenizer" not in message
    fill(tmp_path, other)
    assert len(opened(tmp_path, data)) == COUNT and len(opened(tmp_path, other)) == 2


def test_any_flipped_byte_is_found(tmp_path: Path, data: TokenizedSet) -> None:
    records = fill(tmp_path, data) / "records.npy"
    whole = records.read_bytes()
    generator = np.random.default_rng(0)
    for at in [0, 8, 60, 127, 128, len(whole) - 1, *generator.integers(0, len(whole), 60).tolist()]:
        records.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << int(generator.integers(8)))]) + whole[at + 1 :])
        assert "is damaged" in refusal(tmp_path, data)
    for torn in (whole[:-24], whole[:-1], whole[:50], b"", whole + b"\0"):
        records.write_bytes(torn)
        assert "is damaged" in refusal(tmp_path, data)
    records.unlink()
    assert "records.npy cannot be read ([Errno 2]" in refusal(tmp_path, data)
    fill(tmp_path, data)
    opened(tmp_path, data)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "{",
        "[]",
        '{"version": 99, "count": 1, "xxh3_128": "", "fingerprint": {}}',
        '{"version": 1, "fingerprint": 3}',
    ],
)
def test_unreadable_index(tmp_path: Path, data: TokenizedSet, index: str) -> None:
    folder = fill(tmp_path, data)
    (folder / "index.json").write_text(index)
    message = refusal(tmp_path, data)
    assert str(folder) in message and ("index.json cannot be read" in message or "has format 99" in message)
    fill(tmp_path, data)
    opened(tmp_path, data)


def test_changed_count_in_the_index(tmp_path: Path, data: TokenizedSet) -> None:
    path = fill(tmp_path, data) / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "count": 10**6}))
    assert "too short for the 1000000 pairs in index.json" in refusal(tmp_path, data)
    path.write_text(json.dumps({**json.loads(path.read_text()), "count": 49}))
    assert "has 49 pairs instead of 50" in refusal(tmp_path, data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_is_never_stored_nor_served(tmp_path: Path, data: TokenizedSet, value: float) -> None:
    filling = writer(tmp_path, data)
    chosen = CHOSEN[:CHUNK].copy()
    chosen[3] = value
    with pytest.raises(UserError, match=r"a log-prob of -?(nan|inf) for 'chosen' in .*pairs.jsonl line 4"):
        filling.write_chunk(0, chosen, REJECTED[:CHUNK])
    records = np.zeros(COUNT, dtype=RECORD)
    records["row_hash"] = data.row_hashes
    records["rejected"][5] = value
    store = ReferenceStore(records, data, tmp_path)
    store.get([4, 6])
    with pytest.raises(UserError, match="the record of .*pairs.jsonl line 6 is invalid"):
        store.get([4, 5])


def test_sft_sets(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "completion": "x" * i} for i in range(1, 4)]
    data = build(lines(tmp_path / "sft.jsonl", rows), kind="any")
    filling = ReferenceWriter.open(tmp_path / "cache", "sft", fingerprint(data), data)
    filling.write_chunk(0, [-1.0, -2.0, -3.0], np.zeros(3))
    filling.finish()
    store = open_reference(tmp_path / "cache", "sft", fingerprint(data), data)
    assert store.get([2])[0].tolist() == [-3.0] and store.get([0, 1])[1].tolist() == [0.0, 0.0]


def test_unwritable_cache(tmp_path: Path, data: TokenizedSet) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written: .*; set reference.cache to another folder"):
        writer(tmp_path / "cache", data)
    assert "there is no reference cache" in refusal(tmp_path / "cache", data)


def test_names_that_are_no_file_names(tmp_path: Path, data: TokenizedSet) -> None:
    folder = cache_folder(tmp_path, "org/name (test)", fingerprint(data))
    assert folder.parent == tmp_path and folder.name == f"org_name_test-{data.fingerprint[:12]}"
