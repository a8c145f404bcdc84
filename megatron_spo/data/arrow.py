"""Converts Python values to Arrow arrays and back through their buffers.

pyarrow's conversions (`pa.array`, `to_numpy`) import pandas if it is installed, which takes half a second.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def number_array(values: NDArray[Any]) -> pa.Array:
    """Returns an Arrow array of the integers [n] without copying them."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def to_array(kind: pa.DataType, values: Sequence[Any]) -> pa.Array:
    """Converts values to an Arrow array of integers, booleans, strings (None is null) or lists of integers."""
    if kind == pa.bool_():
        return pa.Array.from_buffers(kind, len(values), [None, _bits(values)])
    if kind == pa.string():
        texts = [(value or "").encode() for value in values]
        known = _bits([value is not None for value in values])
        return pa.Array.from_buffers(kind, len(values), [known, _offsets(texts), pa.py_buffer(b"".join(texts))])
    if isinstance(kind, pa.ListType):
        items = np.concatenate([np.zeros(0, dtype=str(kind.value_type)), *values], dtype=str(kind.value_type))
        return pa.Array.from_buffers(kind, len(values), [None, _offsets(values)], children=[number_array(items)])
    return number_array(np.array(values, dtype=str(kind)))


def to_numpy(column: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """Converts integers or booleans without nulls to NumPy [n]; a view if the column is one chunk of integers."""
    if isinstance(column, pa.ChunkedArray):
        if column.num_chunks == 1:
            return to_numpy(column.chunk(0))
        dtype = "bool" if column.type == pa.bool_() else str(column.type)
        return np.concatenate([np.zeros(0, dtype=dtype), *map(to_numpy, column.chunks)])
    assert column.null_count == 0
    data, end = column.buffers()[1], column.offset + len(column)
    if column.type == pa.bool_():
        bits = np.unpackbits(np.frombuffer(data or b"", dtype=np.uint8), count=end, bitorder="little")
        return bits[column.offset :].astype(bool)
    return np.frombuffer(data or b"", dtype=str(column.type))[column.offset : end]


def _bits(values: Sequence[bool]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(np.array(values, dtype=bool), bitorder="little"))


def _offsets(values: Sequence[Any]) -> pa.Buffer:
    """Returns the start of each value and the end of the last one."""
    return pa.py_buffer(np.cumsum([0, *map(len, values)], dtype=np.int32))
