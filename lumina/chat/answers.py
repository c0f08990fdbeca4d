"""Answer reader of Lumina's chat template: the tokens of an answer to its reasoning, content and tool calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lumina.chat.protocol import AnswerDelta, IncrementalDecoder
from lumina.chat.tool_calls import read_call

_CONTENT, _REASONING, _CALL = "content", "<|reasoning|>", "<|tool_call|>"  # parts, by the token that begins them
_ENDS = {"<|reasoning_end|>": _REASONING, "<|tool_call_end|>": _CALL}


class PartsReader:
    """Reads an answer in the form of agent_parts.py (an AnswerReader).

    A call is given when its end has come. What breaks the form is read all the same: reasoning that has no end is
    reasoning, a call that has none, or does not parse, is content; a token where it has no meaning says nothing.

    Args:
        new_decoder: makes a decoder for each part.
        special_names: the special tokens' names by id.
        reasoning: whether the prompt has begun the reasoning.
    """

    def __init__(
        self, new_decoder: Callable[[], IncrementalDecoder], special_names: Mapping[int, str], reasoning: bool = False
    ) -> None:
        self._new_decoder, self._special_names = new_decoder, special_names
        self._decoder = new_decoder()
        self._part = _REASONING if reasoning else _CONTENT
        self._call = ""

    def push(self, token: int) -> AnswerDelta:
        name = self._special_names.get(token)
        if name is None:
            return self._said(self._decoder.push(token))
        if name in (_REASONING, _CALL):
            return self._leave(name)
        ended = _ENDS.get(name)
        return self._leave(_CONTENT, whole=True) if ended == self._part else AnswerDelta()

    def end(self) -> AnswerDelta:
        return self._leave(_CONTENT)

    def _said(self, text: str) -> AnswerDelta:
        if self._part == _CALL:
            self._call += text
            return AnswerDelta()
        return AnswerDelta(reasoning=text) if self._part == _REASONING else AnswerDelta(content=text)

    def _leave(self, part: str, whole: bool = False) -> AnswerDelta:
        """Go on with `part`. whole: the part that is left has its end."""
        delta = self._said(self._decoder.end())
        if self._part == _CALL:
            call = read_call(self._call) if whole else None
            delta = AnswerDelta(content=self._call) if call is None else AnswerDelta(tool_calls=(call,))
        self._part, self._call, self._decoder = part, "", self._new_decoder()
        return delta
