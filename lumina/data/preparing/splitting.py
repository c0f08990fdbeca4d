"""Splitting one overlong conversation: where its chunks begin and end, and which earlier tokens each begins with.

With a `budget` of context tokens, a chunk after the first begins with the system message (without one, with the tools
that the template puts before the first message), where that fits the budget, and with as much of the end of the
question as the rest of it holds. The question is the run of user and tool messages before the first supervised answer
of the chunk. Chunks end between messages; among those places one that leaves the
chunk with something supervised goes before one that does not, and one that keeps a question with its answer before one
between them; where none leaves it with something supervised, the answer is split.

Without a budget, chunks end where the last message that fits does, as they did up to version 0.2.0.

All places are token offsets in the block that the conversation lies in.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lumina.chat import ROLES, TEXT_ROLE

_SYSTEM, _ASSISTANT = ROLES.index("system"), ROLES.index("assistant")
_NOT_ASKING = frozenset([_SYSTEM, _ASSISTANT, ROLES.index(TEXT_ROLE)])


class Part(NamedTuple):
    """The chunk [start, stop), after its context: [opening, opening_stop) the system message or tools, [question,
    question_stop) the end of the question, and `lead` (0 or 1) tokens before `start`."""

    opening: int
    opening_stop: int
    question: int
    question_stop: int
    lead: int
    start: int
    stop: int


@dataclass
class Split:
    """The chunks of a conversation; how many of its messages (but for those marked as repeated) they cut, and how many
    answers begin in one without a token of their question, or with its end alone."""

    parts: list[Part] = field(default_factory=list)
    cut: int = 0
    without_question: int = 0
    question_cut: int = 0


@dataclass
class Overlong:
    """A conversation of M messages: offsets[M+1], roles[M] (indices into ROLES), heads[M] and repeated[M] as in
    RenderedBlock, and the loss mask of the whole block as bytes."""

    offsets: Sequence[int]
    roles: Sequence[int]
    heads: Sequence[int]
    repeated: Sequence[bool]
    mask: bytes

    def __post_init__(self) -> None:
        count = next((number for number, role in enumerate(self.roles) if role != _SYSTEM), len(self.roles))
        self._opening_stop: int = self.offsets[count]
        # Tools without a system message stand before the first message, which no other has so many tokens before.
        asks = self.roles[0] not in _NOT_ASKING
        if asks and self.heads[0] > max(self.heads[1:], default=self.heads[0]):
            self._opening_stop += self.heads[0]

    def split(self, seq_length: int, budget: int) -> Split:
        """Its chunks with a supervised token, each of at most `seq_length` tokens, its context included."""
        found, last_cut = Split(), -1
        start, end = self.offsets[0], self.offsets[-1]
        while start < end:
            message = bisect_right(self.offsets, start) - 1
            if self.offsets[message] != start and message != last_cut:
                found.cut += not self.repeated[message]
                last_cut = message
            target = self._supervised(start + (start == self.offsets[0]), end)  # nothing comes before the first token
            answer = -1 if target is None else bisect_right(self.offsets, target) - 1
            asked = self._question_of(answer)
            begin, opening_stop, question, question_stop, lead = self._context(start, message, target, asked, budget)
            limit = start + seq_length - (opening_stop - begin + question_stop - question + lead)
            stop = end if end <= limit else self._stop(start, limit, target if budget else None)
            if target is not None and target < stop:
                found.parts.append(Part(begin, opening_stop, question, question_stop, lead, start, stop))
            # Not of an answer that began in an earlier chunk.
            if asked is not None and self._supervised(self.offsets[answer], stop) == target:
                held = question_stop - question + max(0, asked[1] - max(asked[0], start))
                found.without_question += held == 0
                found.question_cut += 0 < held < asked[1] - asked[0]
            start = stop
        return found

    def _supervised(self, start: int, stop: int) -> int | None:
        """The first supervised token in [start, stop)."""
        place = self.mask.find(1, start, stop)
        return None if place < 0 else place

    def _question_of(self, message: int) -> tuple[int, int] | None:
        """The last run of user and tool messages before an answer: [start, stop). None without one, as of a text."""
        if message < 0 or self.roles[message] != _ASSISTANT:
            return None
        last = message - 1
        while last >= 0 and self.roles[last] in _NOT_ASKING:
            last -= 1
        first = last
        while first >= 0 and self.roles[first] not in _NOT_ASKING:
            first -= 1
        return None if last < 0 else (max(self.offsets[first + 1], self._opening_stop), self.offsets[last + 1])

    def _context(
        self, start: int, message: int, target: int | None, asked: tuple[int, int] | None, budget: int
    ) -> tuple[int, int, int, int, int]:
        """The first five fields of the Part that begins at `start`, inside `message` or with it, whose first supervised
        token is `target` and whose question is `asked`."""
        begin = self.offsets[0]
        if start == begin:
            return begin, begin, begin, begin, 0
        # Of some templates an answer begins with its first supervised token, which needs one before it too.
        lead = target == start or self.offsets[message] != start
        if not budget or target is None:
            return begin, begin, begin, begin, int(lead)
        fits = self._opening_stop <= start and self._opening_stop - begin <= budget
        opening_stop = self._opening_stop if fits else begin
        question = question_stop = opening_stop
        if asked is not None and asked[0] < start:
            question_stop = min(asked[1], start)
            wanted = min(asked[1] - asked[0], budget - (opening_stop - begin))
            question = question_stop - max(0, wanted - (asked[1] - question_stop))
        joined = question_stop == start if question < question_stop else opening_stop == start
        return begin, opening_stop, question, question_stop, int(lead and not joined)

    def _stop(self, start: int, limit: int, target: int | None) -> int:
        """Where the chunk from `start` ends that may go up to `limit`. `target`: its first supervised token, where what
        it teaches counts."""
        last = bisect_right(self.offsets, limit) - 1
        if target is None or target >= limit:
            return self.offsets[last] if self.offsets[last] > start else limit
        after: int | None = None
        for message in range(last, 0, -1):
            place = self.offsets[message]
            if place <= target:
                break
            after = place if after is None else after
            if self.roles[message] != _ASSISTANT or self.roles[message - 1] in _NOT_ASKING:
                return place
        return limit if after is None else after  # inside the answer, if no message ends after its first token
