"""Prefix cache: keys and values of sequences that have ended, for prompts that begin with the same tokens.

A conversation's next turn begins with all that was said before, so its prompt needs a forward pass over the new message
alone. Kept are copies of a row's tokens and no more, so that bytes follow lengths, rows stay free for others, and two
prompts may go on from one entry at a time. The least recently used entry goes first.

Keys and values of a token depend on it and on the tokens before it (in a model with sliding windows too: the cache
holds whole rows), so a common prefix is all that has to agree. They are what some pass computed, though, and passes of
other shapes round otherwise: logits after a reused prefix equal those of a whole prefill within rounding, not bit for
bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.model import CachedRow

LEAST = 16  # tokens: what every prompt of a template begins with saves nothing

Ids = NDArray[np.int64]


class Found(NamedTuple):
    """A row that begins as a prompt does, for `length` tokens."""

    length: int
    row: CachedRow


def common(one: Ids, other: Ids) -> int:
    """How many tokens two sequences have in common from their beginning on."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length


class PrefixCache:
    """At most `most` sequences of at most `most_bytes` together. Of one thread."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._entries: OrderedDict[int, tuple[Ids, CachedRow]] = OrderedDict()  # the least recently used first
        self._next = 0
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def wants(self, tokens: Sequence[int], size: int) -> bool:
        """Whether a row of these tokens and `size` bytes is worth a copy. One that is held already is not."""
        if self._most < 1 or len(tokens) < LEAST or size > self._most_bytes:
            return False
        ids = np.array(tokens, dtype=np.int64)
        key = next((key for key, (held, _) in self._entries.items() if common(held, ids) == len(ids)), None)
        if key is not None:
            self._entries.move_to_end(key)
        return key is None

    def add(self, tokens: Sequence[int], row: CachedRow) -> None:
        """Keep a row that is wanted; entries that it begins with go, and then the least recently used."""
        ids = np.array(tokens, dtype=np.int64)
        for key, (held, _) in list(self._entries.items()):
            if common(held, ids) == len(held):
                self._drop(key)
        self._entries[self._next] = ids, row
        self._next += 1
        self.bytes += row.nbytes
        while len(self._entries) > self._most or self.bytes > self._most_bytes:
            self._drop(next(iter(self._entries)))

    def longest(self, tokens: Sequence[int]) -> Found | None:
        """The entry that begins as these tokens do for longest, if it is worth it. At least one token is left to feed:
        its logits are wanted."""
        ids = np.array(tokens[:-1], dtype=np.int64)
        found = [(common(held, ids), key) for key, (held, _) in self._entries.items()]
        count, key = max(found, default=(0, -1))
        if count < LEAST:
            return None
        self._entries.move_to_end(key)
        return Found(count, self._entries[key][1])

    def _drop(self, key: int) -> None:
        self.bytes -= self._entries.pop(key)[1].nbytes
