"""Splitting one overlong conversation: where its chunks begin and end, and which earlier tokens each begins with.

With a `budget` of context tokens, a chunk after the first begins with the system message (without one, with the tools
that the template puts before the first message), where that fits the budget, and with as much of the end of the
question as the rest of it holds. The question is the run of user and tool messages before the first supervised answer
of the chunk. Chunks end between messages; among those places one that leaves the chunk with something supervised goes
before one that does not, and one that keeps a question with its answer before one between them; where none leaves it
with something supervised, the answer is split.

Without a budget, chunks end where the last message that fits does, as they did up to version 0.2.0.

All places are token offsets in the block that the conversation lies in.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from lumina.chat import ROLES, TEXT_ROLE

_USER, _SYSTEM, _ASSISTANT = ROLES.index("user"), ROLES.index("system"), ROLES.index("assistant")
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


class Split(NamedTuple):
    """The chunks of a conversation, the fields of one Part after another; how many of its messages (but for those
    marked as repeated) they cut, and how many answers begin in one without a token of their question, or with its end
    alone."""

    parts: list[int]
    cut: int
    without_question: int
    question_cut: int


class Overlong(NamedTuple):
    """A conversation of M messages: offsets[M+1], roles[M] (indices into ROLES), heads[M] and repeated[M] as in
    RenderedBlock, and the loss mask of the whole block; in bytes what has one for each."""

    offsets: list[int]
    roles: bytes
    heads: list[int]
    repeated: bytes
    mask: bytes

    def split(self, seq_length: int, budget: int) -> Split:
        """Its chunks with a supervised token, each of at most `seq_length` tokens, its context included."""
        # Half of the time of chunking is spent in this loop: hence the local names, and one long function.
        offsets, roles, next_supervised = self.offsets, self.roles, self.mask.find
        begin, end = offsets[0], offsets[-1]
        opening_stop = self._opening_stop()
        opening = opening_stop - begin if opening_stop - begin <= budget else 0
        parts: list[int] = []
        cut = without_question = question_cut = 0
        start, message, last_cut, answer, asked, asked_stop = begin, 0, -1, -1, -1, -1
        while start < end:
            message = bisect_right(offsets, start, message) - 1
            inside = offsets[message] != start
            if inside and message != last_cut:
                cut += 1 - self.repeated[message]
                last_cut = message
            target = next_supervised(1, start + (start == begin), end)  # nothing comes before the first token
            if target >= 0 and (answer < 0 or target >= offsets[answer + 1]):
                answer = bisect_right(offsets, target, message) - 1
                if answer > 1 and roles[answer - 2] == roles[answer] == _ASSISTANT and roles[answer - 1] == _USER:
                    asked, asked_stop = offsets[answer - 1], offsets[answer]  # by far the most frequent
                else:
                    asked, asked_stop = self._question_of(answer, opening_stop)

            shown, question, question_stop = 0, begin, begin
            # Of some templates an answer begins with its first supervised token, which needs one before it too.
            lead = start > begin and (inside or target == start)
            if budget and target >= 0:
                shown = opening if opening_stop <= start else 0
                question = question_stop = begin + shown
                if 0 <= asked < start:
                    question_stop = asked_stop if asked_stop < start else start
                    length, room = asked_stop - asked, budget - shown
                    wanted = (length if length < room else room) - (asked_stop - question_stop)
                    question = question_stop - wanted if wanted > 0 else question_stop
                lead = lead and (question_stop if question < question_stop else begin + shown) != start

            limit = start + seq_length - (shown + question_stop - question + lead)
            if end <= limit:
                stop = end
            elif budget and 0 <= target < limit:
                stop = self._stop(limit, target, message)
            else:
                last = offsets[bisect_right(offsets, limit, message) - 1]
                stop = last if last > start else limit
            if 0 <= target < stop:
                parts += (begin, begin + shown, question, question_stop, lead, start, stop)
                # An answer counts where it begins: not where tokens of it were supervised in an earlier chunk.
                if asked >= 0 and (offsets[answer] >= start or next_supervised(1, offsets[answer], start) < 0):
                    held = question_stop - question
                    if asked_stop > start:
                        held += asked_stop - (asked if asked > start else start)
                    without_question += held == 0
                    question_cut += 0 < held < asked_stop - asked
            start = stop
        return Split(parts, cut, without_question, question_cut)

    def _opening_stop(self) -> int:
        """Where the system messages end that it begins with, or else the tools before its first message."""
        roles, heads = self.roles, self.heads
        count = 0
        while count < len(roles) and roles[count] == _SYSTEM:
            count += 1
        # Tools without a system message stand before the first message, which no other has so many tokens before.
        if not count and heads[0] and roles[0] not in _NOT_ASKING and heads[0] > max(heads[1:], default=heads[0]):
            return self.offsets[0] + heads[0]
        return self.offsets[count]

    def _question_of(self, message: int, opening_stop: int) -> tuple[int, int]:
        """The last run of user and tool messages before an answer: [start, stop). (-1, -1) without one, as of a
        text."""
        roles = self.roles
        if roles[message] != _ASSISTANT:
            return -1, -1
        last = message - 1
        while last >= 0 and roles[last] in _NOT_ASKING:
            last -= 1
        if last < 0:
            return -1, -1
        first = last
        while first >= 0 and roles[first] not in _NOT_ASKING:
            first -= 1
        return max(self.offsets[first + 1], opening_stop), self.offsets[last + 1]

    def _stop(self, limit: int, target: int, message: int) -> int:
        """Where the chunk ends that begins in `message` and may go up to `limit`. `target`: its first supervised
        token."""
        offsets, roles = self.offsets, self.roles
        last = number = bisect_right(offsets, limit, message) - 1
        while (place := offsets[number]) > target:
            if roles[number] != _ASSISTANT or roles[number - 1] in _NOT_ASKING:
                return place
            number -= 1
        # Between a question and its answer, if it has to be; inside the answer, if no message ends after its first.
        return offsets[last] if last > number else limit
