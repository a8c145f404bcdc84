"""Arrow arrays created from buffers equal those that pyarrow creates."""

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from megatron_spo.data.arrow import to_array, to_numpy
from megatron_spo.data.tokenized_files import IDS
from megatron_spo.runtime.env import datasets_cache

COLUMNS: list[tuple[pa.DataType, list[Any]]] = [
    (pa.int32(), [3, -1, 2**31 - 1] * 5),
    (pa.uint64(), [0, 2**64 - 1, 7]),
    (pa.bool_(), [i % 3 == 0 for i in range(19)]),
    (pa.string(), ["a", None, "", "prömpt", None] * 4),
    (IDS, [np.arange(n, dtype=np.int32) for n in (0, 3, 0, 11)]),
]


@pytest.mark.parametrize(("kind", "values"), [*COLUMNS, *((kind, []) for kind, _ in COLUMNS)])
def test_arrays_are_those_of_pyarrow(kind: pa.DataType, values: list[Any]) -> None:
    ours, theirs = to_array(kind, values), pa.array(values, kind)
    ours.validate(full=True)
    assert ours.equals(theirs) and ours.null_count == theirs.null_count


@pytest.mark.parametrize(("kind", "values"), COLUMNS[:3])
def test_numbers_of_whole_cut_and_joined_columns(kind: pa.DataType, values: list[Any]) -> None:
    array = pa.array(values, kind)
    for column in (array, array[2:], array[:0], pa.chunked_array([array[1:], array[:2]]), pa.chunked_array([], kind)):
        found = to_numpy(column)
        assert (
            found.tolist() == column.to_pylist()
            and found.dtype == np.array(column.to_pylist(), dtype=kind.to_pandas_dtype()).dtype
        )


def test_the_folder_of_tokenised_rows_is_that_of_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert datasets_cache() == datasets.config.HF_DATASETS_CACHE
    monkeypatch.setenv("HF_DATASETS_CACHE", "/elsewhere")
    assert str(datasets_cache()) == "/elsewhere"
