"""Best-fit decreasing bin packing, exact and in bulk.

Chunks are taken longest first; each goes into the fullest row that still holds it (Johnson, 1973). Equal lengths are
placed together: if c is the smallest room that takes length L, a row with room c takes c // L chunks of that length one
after another, since after each its room is the smaller one and so still the best fit. That turns the loop over chunks
into one over (length, room) pairs, each an array operation, with the same result as the loop over chunks.

Memory is a few bytes per chunk; the token data is never touched.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray


class _Rooms:
    """Rows by the room left in them: a stack of rows for each room that some row has, and these rooms in order. Nothing
    grows with the rooms that a row may have, which are as many as a context of millions has tokens."""

    def __init__(self) -> None:
        self._stacks: dict[int, list[NDArray[np.int64]]] = {}
        self._present: list[int] = []

    def smallest_at_least(self, length: int) -> int | None:
        place = bisect_left(self._present, length)
        return self._present[place] if place < len(self._present) else None

    def put(self, room: int, rows: NDArray[np.int64]) -> None:
        if not rows.size:
            return
        if room not in self._stacks:
            insort(self._present, room)
            self._stacks[room] = []
        self._stacks[room].append(rows)

    def take(self, room: int, limit: int) -> NDArray[np.int64]:
        """At most `limit` rows of that room, the most recently put first."""
        stack = self._stacks[room]
        taken: list[NDArray[np.int64]] = []
        while stack and limit > 0:
            rows = stack.pop()
            if rows.size > limit:
                stack.append(rows[:-limit])
                rows = rows[-limit:]
            taken.append(rows)
            limit -= rows.size
        if not stack:
            del self._stacks[room], self._present[bisect_left(self._present, room)]
        return np.concatenate(taken)


def pack(lengths_C: NDArray[np.int32], capacity: int) -> NDArray[np.int64]:
    """The row of every chunk: row_C int64, rows numbered from 0, none holding more than `capacity` tokens.

    Args:
        lengths_C: chunk lengths, each in [1, capacity].
    """
    row_C = np.empty(len(lengths_C), dtype=np.int64)
    if not len(lengths_C):
        return row_C
    assert lengths_C.min() >= 1
    assert lengths_C.max() <= capacity
    rooms, next_row = _Rooms(), 0
    order_C = np.argsort(-lengths_C.astype(np.int64), kind="stable")
    sorted_C = lengths_C[order_C]
    bounds = np.flatnonzero(np.diff(sorted_C)) + 1
    for group in np.split(order_C, bounds):
        length, placed = int(lengths_C[group[0]]), 0
        while placed < group.size:
            left = group.size - placed
            room = rooms.smallest_at_least(length)
            fresh = room is None
            if room is None:
                room = capacity
            each = room // length
            wanted = -(-left // each)
            if fresh:
                rows = np.arange(next_row, next_row + wanted, dtype=np.int64)
                next_row += wanted
            else:
                rows = rooms.take(room, wanted)
            count = min(left, rows.size * each)
            row_C[group[placed : placed + count]] = np.repeat(rows, each)[:count]
            placed += count
            full, rest = divmod(count, each)
            rooms.put(room - each * length, rows[:full])
            if rest:
                rooms.put(room - rest * length, rows[full : full + 1])
    return row_C


def rows_to_chunks(row_C: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(chunks_C, offsets_R1): the chunks of row r are chunks_C[offsets[r] : offsets[r + 1]], in ascending order."""
    chunks_C = np.argsort(row_C, kind="stable")
    offsets = np.zeros(int(row_C.max()) + 2 if len(row_C) else 1, dtype=np.int64)
    np.cumsum(np.bincount(row_C), out=offsets[1:])
    return chunks_C, offsets
