"""Leaving out pairs by the scores in the reference's cache, over several sources."""

from pathlib import Path

import numpy as np
import pytest

from megatron_spo.config.schema import DataSource
from megatron_spo.data.diagnostics import drop_highest
from megatron_spo.errors import UserError
from megatron_spo.reference.cache import RECORD, ReferenceStore
from tests.data.helpers import build, lines, pair


def test_the_cache_s_rows_go_with_those_of_each_source(tmp_path: Path) -> None:
    names = [[f"{source}{i}" for i in range(4)] for source in "ab"]
    files = [lines(tmp_path / f"{one[0]}.jsonl", [pair(prompt=text) for text in one]) for one in names]
    unusable = lines(tmp_path / "c.jsonl", [pair(chosen="")])
    dataset = build([DataSource(path=str(file)) for file in (*files, unusable)], bad_rows="drop")
    records = np.zeros(8, dtype=RECORD)
    records["row_hash"], records["chosen"] = dataset.row_hashes, -np.arange(8)
    records["ches_per_token"] = [0, 9, 1, 2, 3, 4, 8, 5]
    store = ReferenceStore(records, dataset, tmp_path)
    rest, left = drop_highest(dataset, store, 0.25)
    assert rest.source_sizes == (3, 3, 0)
    assert [rest.line(i) for i in range(6)] == [1, 3, 4, 1, 2, 4]
    assert left.get(np.arange(6))[0].tolist() == [0, -2, -3, -4, -5, -7]
    assert [(Path(row.file).name, row.line) for row in rest.dropped] == [
        ("c.jsonl", 1),
        ("a0.jsonl", 2),
        ("b0.jsonl", 3),
    ]
    records["ches_per_token"] = [0, 1, 2, 3, 9, 9, 9, 9]
    with pytest.raises(UserError, match="leaves no pair of one source"):
        drop_highest(dataset, store, 0.5)
