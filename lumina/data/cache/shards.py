"""The cache on disk: one Arrow IPC file of chunks per task, and one of the packing plan. Read through memory maps.

The names of files and columns are those of version 0.1.0, whose caches are read: `pieces` are chunks, `trained` are
supervised messages. Up to version 0.2.0 `context` was bool (a chunk inside a message began with one token more), and
there was no `repeated`.

Chunks, a record batch per block of input:
    ids list<int32>, mask list<uint8>           the tokens and which of them are supervised as targets
    tokens, supervised int32                    how many of each
    trained, masked int32                       messages counted in it: supervised, others
    context int32                               how many tokens it begins with that come from earlier in the record
    repeated int32                              how many of its tokens are counted elsewhere
    line int64                                  the record's line within its task, from 1
Plan, one record batch:
    tokens, supervised int32                    of a sample (a packed row, or one chunk)
    pieces list<int64>                          global chunk numbers, in the order of tasks and rows
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lumina.data.cache.arrow import integers
from lumina.data.cache.chunks import Chunks
from lumina.files import atomic_file, rename_durably

CHUNKS = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("mask", pa.list_(pa.uint8())),
        ("tokens", pa.int32()),
        ("supervised", pa.int32()),
        ("trained", pa.int32()),
        ("masked", pa.int32()),
        ("context", pa.int32()),
        ("repeated", pa.int32()),
        ("line", pa.int64()),
    ]
)
PLAN = pa.schema([("tokens", pa.int32()), ("supervised", pa.int32()), ("pieces", pa.large_list(pa.int64()))])


# The columns that are read here, and what they hold; `context` was bool.
_READ = {
    "ids": (pa.list_(pa.int32()),),
    "mask": (pa.list_(pa.uint8()),),
    "context": (pa.int32(), pa.bool_()),
    "line": (pa.int64(),),
}


class ChunkWriter:
    """Writes one task's chunks to PATH, whole or not at all: the name appears when everything is on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # A worker left over from a killed run may still be writing the same task: each writes its own file.
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._sink = pa.OSFile(str(self._partial), "wb")
        self._writer = pa.ipc.new_file(self._sink, CHUNKS)
        self.rows: list[int] = []  # per record batch

    def write(self, chunks: Chunks, lines: NDArray[np.int64]) -> None:
        """Appends the chunks as one record batch. `lines` int64[C]: the record number of each."""
        count = len(chunks.context)
        if not count:
            return
        offsets = integers(pa.int32(), chunks.offsets.astype(np.int32))
        supervised = np.add.reduceat(chunks.mask, chunks.offsets[:-1], dtype=np.int32)
        columns = [
            pa.ListArray.from_arrays(offsets, integers(pa.int32(), chunks.ids)),
            pa.ListArray.from_arrays(offsets, integers(pa.uint8(), chunks.mask)),
            integers(pa.int32(), np.diff(chunks.offsets).astype(np.int32)),
            integers(pa.int32(), supervised),
            integers(pa.int32(), chunks.messages_supervised.astype(np.int32)),
            integers(pa.int32(), chunks.messages_masked.astype(np.int32)),
            integers(pa.int32(), chunks.context.astype(np.int32)),
            integers(pa.int32(), chunks.repeated.astype(np.int32)),
            integers(pa.int64(), lines),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=CHUNKS))
        self.rows.append(count)

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        self._sink.close()
        if kind is None:
            rename_durably(self._partial, self._path)
        else:
            self._partial.unlink(missing_ok=True)


def write_plan(
    path: Path,
    tokens: NDArray[np.int32],
    supervised: NDArray[np.int32],
    chunks: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> None:
    """Writes the samples: tokens, supervised int32[S]; chunks int64[C] grouped by offsets int64[S+1]."""
    lists = pa.LargeListArray.from_arrays(integers(pa.int64(), offsets), integers(pa.int64(), chunks))
    counts = [integers(pa.int32(), column) for column in (tokens, supervised)]
    batch = pa.record_batch([*counts, lists], schema=PLAN)
    with atomic_file(path) as scratch, pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, PLAN) as writer:
        writer.write_batch(batch)


def open_batches(path: Path) -> list[Any]:
    """The file's record batches over a memory map: nothing is read until it is used."""
    reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def open_chunks(path: Path) -> list[Any]:
    """`open_batches` of a file of chunks. ValueError where it is damaged; OSError is what the system says."""
    try:
        batches = open_batches(path)
    except OSError as error:
        if error.errno is None:  # pyarrow's own, of a footer or a batch that makes no sense
            raise ValueError(f"{path} is damaged: {error}") from error
        raise
    for name, kinds in _READ.items():
        for schema in (batch.schema for batch in batches[:1]):
            place = schema.get_field_index(name)
            if place < 0 or schema.field(place).type not in kinds:
                raise ValueError(f"{path} is damaged: it has no column {name}, or one of another type")
    return batches
