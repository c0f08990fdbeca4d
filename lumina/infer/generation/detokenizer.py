"""Incremental detokenizer: an answer's tokens as text, up to its stop texts.

Text that may turn out to be the beginning of a stop text is held back until it is known not to be one, so what a
reader has seen never has to be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence

from lumina.chat import IncrementalDecoder


class Detokenizer:
    """Turns one answer's tokens into text. `stopped` is True once a stop text has come; what follows is dropped."""

    def __init__(self, stream: IncrementalDecoder, stops: Sequence[str] = ()) -> None:
        self._stream, self._stops = stream, tuple(stops)
        self._held = ""
        self.text = ""
        """What has been given out so far."""
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be given out now that `token` has come; often nothing."""
        return self._emit(self._stream.push(token), final=False)

    def end(self) -> str:
        """The answer is over: the rest. U+FFFD stands for a character that was not finished."""
        return self._emit(self._stream.end(), final=True)

    def _emit(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, text, self._held = True, text[: min(found)], ""
        else:
            hold = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
            text, self._held = text[: len(text) - hold], text[len(text) - hold :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
