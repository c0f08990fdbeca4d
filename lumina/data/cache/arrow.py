"""Arrow arrays and NumPy arrays over the same memory. pyarrow's own `array` and `to_numpy` do this and more, for which
they import pandas wherever there is one: most of a second in every rank and worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def integers(kind: pa.DataType, values: NDArray[Any]) -> pa.Array:
    """`values` [N] of the very dtype that `kind` stands for; a TypeError otherwise."""
    if values.dtype != kind.to_pandas_dtype():
        raise TypeError(f"{values.dtype} is not {kind}")
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def strings(texts: Sequence[str]) -> pa.Array:
    """UnicodeEncodeError where half of a surrogate pair stands alone."""
    encoded = list(map(str.encode, texts))
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, encoded), dtype=np.int64, count=len(texts)), out=offsets[1:])
    return pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))


def numpy(array: pa.Array) -> NDArray[Any]:
    """The values [N] of an array of integers or booleans: integers are read where they are, a bit becomes a byte.
    ValueError where a value is missing."""
    if array.null_count:
        raise ValueError(f"{array.null_count} values are missing")
    end, data = array.offset + len(array), array.buffers()[1]
    if pa.types.is_boolean(array.type):
        bits = np.unpackbits(_bytes(data), count=end, bitorder="little")
        return bits[array.offset :].view(np.bool_)
    width = array.type.bit_width // 8
    return _bytes(data)[array.offset * width : end * width].view(array.type.to_pandas_dtype())


def _bytes(data: pa.Buffer | None) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8) if data is not None and data.size else np.empty(0, np.uint8)
