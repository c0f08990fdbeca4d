"""The cache on disk: one Arrow IPC file of pieces per task, and one of the packing plan. Read through memory maps.

Pieces, a record batch per block of input:
    ids list<int32>, mask list<uint8>           the tokens and which of them are learned as targets
    tokens, supervised int32                    how many of each
    trained, masked int32                       messages that begin in it: learned from, context
    context bool                                the first token is one repeated from the piece before
    line int64                                  the record's line within its task, from 1
Plan, one record batch:
    tokens, supervised int32                    of a sample (a packed row, or one piece)
    pieces list<int64>                          global piece numbers, in the order of tasks and rows
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lumina.data.cache.arrow import booleans, integers
from lumina.data.cache.files import replace_durably
from lumina.data.preparing.chunking import Pieces

PIECES = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("mask", pa.list_(pa.uint8())),
        ("tokens", pa.int32()),
        ("supervised", pa.int32()),
        ("trained", pa.int32()),
        ("masked", pa.int32()),
        ("context", pa.bool_()),
        ("line", pa.int64()),
    ]
)
PLAN = pa.schema([("tokens", pa.int32()), ("supervised", pa.int32()), ("pieces", pa.large_list(pa.int64()))])


class PieceWriter:
    """Writes one task's pieces to PATH, whole or not at all: the name appears when everything is on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # A worker left over from a killed run may still be writing the same piece: each writes its own file.
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._sink = pa.OSFile(str(self._partial), "wb")
        self._writer = pa.ipc.new_file(self._sink, PIECES)
        self.rows: list[int] = []  # per record batch

    def write(self, pieces: Pieces, lines: NDArray[np.int64]) -> None:
        """Appends the pieces as one record batch. `lines` int64[P]."""
        count = len(pieces.context)
        if not count:
            return
        offsets = integers(pa.int32(), pieces.offsets.astype(np.int32))
        learned = np.add.reduceat(pieces.mask, pieces.offsets[:-1], dtype=np.int32)
        columns = [
            pa.ListArray.from_arrays(offsets, integers(pa.int32(), pieces.ids)),
            pa.ListArray.from_arrays(offsets, integers(pa.uint8(), pieces.mask)),
            integers(pa.int32(), np.diff(pieces.offsets).astype(np.int32)),
            integers(pa.int32(), learned),
            integers(pa.int32(), pieces.trained.astype(np.int32)),
            integers(pa.int32(), pieces.masked.astype(np.int32)),
            booleans(pieces.context),
            integers(pa.int64(), lines),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=PIECES))
        self.rows.append(count)

    def __enter__(self) -> PieceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        self._sink.close()
        if kind is None:
            replace_durably(self._partial, self._path)
        else:
            self._partial.unlink(missing_ok=True)


def write_plan(
    path: Path,
    tokens: NDArray[np.int32],
    supervised: NDArray[np.int32],
    pieces: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> None:
    """Writes the samples: tokens, supervised int32[S]; pieces int64[P] grouped by offsets int64[S+1]."""
    lists = pa.LargeListArray.from_arrays(integers(pa.int64(), offsets), integers(pa.int64(), pieces))
    counts = [integers(pa.int32(), column) for column in (tokens, supervised)]
    batch = pa.record_batch([*counts, lists], schema=PLAN)
    partial = path.with_name(path.name + ".tmp")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, PLAN) as writer:
        writer.write_batch(batch)
    replace_durably(partial, path)


def open_batches(path: Path) -> list[Any]:
    """The file's record batches over a memory map: nothing is read until it is used."""
    reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]
