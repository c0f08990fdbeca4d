"""Which part of a row's tokens a rank has, where several share it."""

from __future__ import annotations

from dataclasses import dataclass

from lumina.config import round_up


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts of a row of tokens, by `index` from 0 (sequence parallelism: lumina.model.parallel).
    What is the same for the whole row counts in the first part."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.index == 0

    def bounds(self, tokens: int) -> tuple[int, int]:
        """[start, stop) of the part in a row of `tokens`, which is filled up so that each part has whole tiles: the
        last parts may begin or end beyond it."""
        length = round_up(-(-tokens // self.count))
        return self.index * length, (self.index + 1) * length


WHOLE = Part()
