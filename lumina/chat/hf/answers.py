"""Reads an answer of an imported model: tokens to reasoning, content and tool calls, as they arrive (AnswerReader)."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

from lumina.chat.conversation import ToolCall
from lumina.chat.hf.answer_form import AnswerForm, UnfinishedError
from lumina.chat.protocol import AnswerDelta, IncrementalDecoder


class _State(Enum):
    START = "nothing of the answer is read"
    REASONING = "within reasoning"
    READY = "reasoning has ended, or a call"
    CONTENT = "within a content"
    CALL = "a call has begun"


class FormReader:
    """Follows the texts of an AnswerForm. White space that the template puts around a part is no part of it. A call
    that does not parse is content."""

    def __init__(self, form: AnswerForm, decoder: IncrementalDecoder, stop_ids: Collection[int], begun: bool) -> None:
        """`decoder` names special tokens; `begun`: the prompt ends within reasoning."""
        self._form, self._decoder, self._stops = form, decoder, stop_ids
        self._text = ""  # read and not yet given
        self._state = _State.REASONING if begun else _State.START
        self._fresh = True  # nothing of the part is given
        self._called = False  # a call was read
        self._lead = _after(form.opening) if begun else form.header if form.header.isspace() else ""
        self._closing = form.closing
        self._failed = ""  # the beginning of a call that was none

    def push(self, token: int) -> AnswerDelta:
        if token in self._stops:
            return AnswerDelta()
        self._text += self._decoder.push(token)
        return self._read(final=False)

    def end(self) -> AnswerDelta:
        self._text += self._decoder.end()
        return self._read(final=True)

    def _read(self, final: bool) -> AnswerDelta:
        reasoning, content, calls = "", "", list[ToolCall]()
        while True:
            state, size = self._state, len(self._text)
            if state in (_State.START, _State.READY):
                self._begin(final)
            elif state is _State.REASONING:
                reasoning += self._reasoning(final)
            elif state is _State.CONTENT:
                content += self._content(final)
            else:
                self._call(calls, final)
            if (state, size) == (self._state, len(self._text)):
                return AnswerDelta(reasoning, content, tuple(calls))

    def _begin(self, final: bool) -> None:
        """Which part comes next: the one whose opening text is there; content, when there is none."""
        form, text = self._form, self._text.lstrip()
        options = list[tuple[str, _State]]()
        if self._state is _State.START and form.opening.strip():
            options += [(form.opening, _State.REASONING), (form.other[0], _State.REASONING)]
        if form.header.strip() and not self._called:
            options.append((form.header, _State.CONTENT))
        if form.calls is not None and form.calls.opening.strip():
            options.append((form.calls.opening, _State.CALL))
        if self._called and form.calls is not None:
            options += [(form.calls.another, _State.CALL), (form.calls.closing, _State.READY)]
        options = [(own, state) for own, state in options if own.strip()]
        for own, state in sorted(options, key=lambda option: -len(option[0].strip())):
            mark = own.strip()
            if text.startswith(mark):
                self._failed = self._text[: len(self._text) - len(text) + len(mark)]
                self._text = text[len(mark) :]
                self._closing = form.other[1] if state is _State.REASONING and own == form.other[0] else form.closing
                self._enter(state, _after(own))
                return
            if mark.startswith(text) and not final:
                return  # more of it may come
        if self._text or final:
            self._enter(_State.CONTENT, self._lead)

    def _enter(self, state: _State, lead: str) -> None:
        self._state, self._fresh, self._lead = state, True, lead

    def _reasoning(self, final: bool) -> str:
        """What is certain to be before the text that closes it."""
        closing = self._closing
        mark = closing.strip()
        if not self._trimmed(final):
            return ""
        at = self._text.find(mark)
        if at >= 0:
            found, self._text = self._text[:at].removesuffix(_before(closing)), self._text[at + len(mark) :]
            self._enter(_State.READY, _after(closing))
            return found
        if final:
            found, self._text = self._text.removesuffix(_before(closing)), ""
            return found
        return self._give(_held(self._text, closing, mark))

    def _content(self, final: bool) -> str:
        form = self._form
        if not self._trimmed(final):
            return ""
        mark = form.calls.opening.strip() if form.calls is not None and form.content_calls else ""
        at = self._text.find(mark) if mark else -1
        if at >= 0:
            found = self._text[:at].removesuffix(form.gap)
            self._failed, self._text = self._text[len(found) : at + len(mark)], self._text[at + len(mark) :]
            self._enter(_State.CALL, "")
            return found
        if final:
            found, self._text = self._text.removesuffix(form.tail), ""
            return found
        held = _held(self._text, form.gap + mark, mark) if mark else 0
        return self._give(max(held, _held(self._text, form.tail, form.tail)))

    def _trimmed(self, final: bool) -> bool:
        """Takes the template's white space before a part away. False: more of it may come."""
        if self._fresh and self._lead:
            if len(self._text) < len(self._lead) and self._lead.startswith(self._text) and not final:
                return False
            self._text = self._text.removeprefix(self._lead)
        self._fresh = self._fresh and not self._text
        self._lead = self._lead if self._fresh else ""
        return True

    def _give(self, held: int) -> str:
        size = len(self._text) - held
        found, self._text = self._text[:size], self._text[size:]
        return found

    def _call(self, calls: list[ToolCall], final: bool) -> None:
        assert self._form.calls is not None
        space = len(self._text) - len(self._text.lstrip())
        try:
            found = self._form.calls.parse(self._text, space)
        except UnfinishedError:
            if not final:
                return
            found = None
        if found is None:
            self._text = self._failed + self._text
            self._form = self._form._replace(calls=None)  # what follows is content too
            self._enter(_State.CONTENT, "")
            return
        calls.append(found.call)
        self._text, self._called = self._text[found.end :], True
        self._enter(_State.READY, "\n")


def _before(literal: str) -> str:
    """The white space that a text begins with."""
    return literal[: len(literal) - len(literal.lstrip())]


def _after(literal: str) -> str:
    """The white space that it ends with."""
    return literal[len(literal.rstrip()) :]


def _held(text: str, literal: str, mark: str) -> int:
    """How many characters at the end of a text may be the beginning of a literal, or of its mark."""
    for size in range(min(len(text), max(len(literal), len(mark))), 0, -1):
        if literal.startswith(text[-size:]) or mark.startswith(text[-size:]):
            return size
    return 0
