"""Incremental detokenizer: an answer's tokens as reasoning, content and tool calls; content up to its stop texts.

Content that may turn out to be the beginning of a stop text is held back until it is known not to be one, so what a
reader has seen never has to be taken back. Stop texts are looked for in content alone: reasoning may name them, and a
tool call's arguments may hold them.
"""

from __future__ import annotations

from collections.abc import Sequence

from lumina.chat import AnswerDelta, AnswerReader


class Detokenizer:
    """Reads one answer's tokens. `stopped` is True once a stop text has come; what follows is dropped."""

    def __init__(self, reader: AnswerReader, stops: Sequence[str] = ()) -> None:
        self._reader, self._stops = reader, tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> AnswerDelta:
        """What can be given out now that `token` has come; often nothing."""
        return self._emit(self._reader.push(token), final=False)

    def end(self) -> AnswerDelta:
        """The answer is over: the rest. U+FFFD stands for a character that was not finished."""
        return self._emit(self._reader.end(), final=True)

    def _emit(self, new: AnswerDelta, final: bool) -> AnswerDelta:
        if self.stopped:
            return AnswerDelta()
        text = self._held + new.content
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:  # what the same token brought besides has come before it, or not at all
            self.stopped, text, self._held = True, text[: min(found)], ""
        else:
            hold = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
            text, self._held = text[: len(text) - hold], text[len(text) - hold :]
        return new._replace(content=text)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
