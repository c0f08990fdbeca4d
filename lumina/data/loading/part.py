"""Which part of a row's tokens a rank has, where several share it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts of a row of tokens, by `index` from 0 (sequence parallelism: lumina.model.parallel).
    What is the same for the whole row counts in the first part."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.index == 0


WHOLE = Part()
