"""Where reasoning, content and tool calls stand in the answers of a chat template, found in what it renders of probes.

With the template of Qwen3, of an answer with reasoning, and of one with a call of a tool (| stands before each field):

    <think>\n|REASONING|\n</think>\n\n|CONTENT
    <tool_call>\n{"name": "|NAME|", "arguments": |{...}|}\n</tool_call>

The texts between the fields are the form. Arguments are a JSON object, or written one by one.
"""

from __future__ import annotations

import ast
import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lumina.chat.conversation import ToolCall
from lumina.chat.hf.messages import EscapedCall
from lumina.chat.hf.probing import CONTENT, KEYS, NAMES, REASONING, VALUES, ChatTemplate, probe_answer
from lumina.chat.hf.rendering import common_prefix

_PROBE_ID, _ID = re.compile(r"(00000000[01])"), re.compile(r"[\w.:\-]+")  # of calls: the probes', and any
# A tool's name: with a colon ("server:tool"), or up to one, where a template writes that behind the name.
_NAMES = (re.compile(r"[\w.:\-]+"), re.compile(r"[\w.\-]+"))


class UnfinishedError(Exception):
    """A call of which more text is to come."""


class Parsed(NamedTuple):
    call: ToolCall
    end: int  # in characters


@dataclass(frozen=True)
class CallForm(ABC):
    """The texts around a call's name and arguments."""

    opening: str  # before the first call's name
    another: str  # after a call that another follows, up to the name of that
    closing: str  # after the last call

    def parse(self, text: str, start: int) -> Parsed | None:
        """The call of which the name begins at `start`; None where there is none. Raises UnfinishedError."""
        for pattern in _NAMES:
            name = pattern.match(text, start)
            if name is None:
                _more(text, start)
                return None
            if name.end() == len(text):
                raise UnfinishedError
            found = self._arguments(text, name.end(), name[0])
            if found is not None:
                arguments, end = found
                return Parsed(ToolCall(name[0], json.dumps(arguments, ensure_ascii=False)), end)
        return None

    @abstractmethod
    def _arguments(self, text: str, at: int, name: str) -> tuple[dict[str, Any], int] | None:
        """The arguments that begin at `at`, and where the call ends; None where there are none."""


@dataclass(frozen=True)
class JsonCallForm(CallForm):
    """Arguments as a JSON object."""

    before: str = ""  # between the name and the object; NAMES[0] in it stands for the name again
    after: str = ""

    def _arguments(self, text: str, at: int, name: str) -> tuple[dict[str, Any], int] | None:
        place = _skip(text, at, self.before.replace(NAMES[0], name))
        if place is None:
            return None
        place += len(text[place:]) - len(text[place:].lstrip())
        if place == len(text):
            raise UnfinishedError
        try:
            value, end = json.JSONDecoder().raw_decode(text, place)
        except ValueError as error:
            # What is right as far as it goes fails at its end (a word of JSON has five letters), or within a string.
            fails_late = len(text) - getattr(error, "pos", 0) <= 6 or "Unterminated" in str(error)
            if text[place] == "{" and fails_late:
                raise UnfinishedError from None
            return None
        closed = _skip(text, end, self.after)
        return None if closed is None or not isinstance(value, dict) else (value, closed)


@dataclass(frozen=True)
class ListedCallForm(CallForm):
    """Arguments one by one: key, value, key, value."""

    first: str = ""  # between the name and the first key; NAMES[0] in it stands for the name again
    none: str = ""  # after the name of a call without arguments
    equals: str = ""  # between a key and its value
    quotes: tuple[str, str] = ("", "")  # around a value that is a string
    comma: str = ""  # between a value and the next key
    after: str = ""  # after the last value
    escaped: bool = False  # strings are written with backslashes

    def _arguments(self, text: str, at: int, name: str) -> tuple[dict[str, Any], int] | None:
        first, none = (own.replace(NAMES[0], name) for own in (self.first, self.none))
        shared = first[: common_prefix(first, none)]
        if text.startswith(none, at) and (len(none) > len(shared) or not text.startswith(first, at)):
            return {}, at + len(none)
        place = _skip(text, at, first)
        if place is None:
            if none[len(shared) :].startswith(text[at + len(shared) :]):
                raise UnfinishedError
            return None
        found: dict[str, Any] = {}
        while True:
            key_end = text.find(self.equals, place)
            if key_end < 0:
                raise UnfinishedError
            key, place = text[place:key_end], key_end + len(self.equals)
            value, place, last = self._argument(text, place)
            found[key] = value
            if last:
                return found, place

    def _argument(self, text: str, place: int) -> tuple[Any, int, bool]:
        """A value, the place after what follows it, and whether it is the last."""
        if len(text) - place < len(self.quotes[0]):
            raise UnfinishedError
        quoted = bool(self.quotes[0]) and text.startswith(self.quotes[0], place)
        left, right = self.quotes if quoted else ("", "")
        end = place + len(left) - 1
        while True:  # a list or an object holds what ends others
            ends = [(text.find(right + own, end + 1), own == self.after, own) for own in (self.comma, self.after)]
            if not any(at >= 0 for at, _, _ in ends):
                raise UnfinishedError
            end, last, own = min(one for one in ends if one[0] >= 0)
            raw = text[place + len(left) : end]
            after = end + len(right) + len(own)
            if quoted and self.escaped and raw.endswith("\\"):
                continue
            if quoted:
                return _unescaped(raw, right) if self.escaped else raw, after, last
            value = _value(raw, self.quotes)
            if not (raw.startswith(("[", "{")) and value is raw):
                return value, after, last


def _unescaped(raw: str, quote: str) -> str:
    try:
        return str(ast.literal_eval(quote + raw + quote))
    except (ValueError, SyntaxError):
        return raw


def _value(raw: str, quotes: tuple[str, str]) -> Any:
    """What a value that is written bare stands for: JSON or Python, else its text. Where strings are bare too, nobody
    can tell a number from its digits."""
    text = raw.replace(quotes[0], '"').replace(quotes[1], '"') if quotes[0] and quotes[1] else raw
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if quotes[0] or not isinstance(value, str):
            return value
    return raw


def _more(text: str, at: int) -> None:
    if at >= len(text):
        raise UnfinishedError


def _skip(text: str, at: int, literal: str) -> int | None:
    """The place after a text that has to stand at `at`; white space and ids of calls may differ. Raises
    UnfinishedError."""
    for word in literal.split():
        while at < len(text) and text[at].isspace():
            at += 1
        for part in _PROBE_ID.split(word):
            if _PROBE_ID.fullmatch(part):
                found = _ID.match(text, at)
                if found is not None and found.end() < len(text):
                    at = found.end()
                    continue
                if found is not None or at == len(text):
                    raise UnfinishedError
                return None
            own = text[at : at + len(part)]
            if own != part:
                if part.startswith(own):
                    raise UnfinishedError
                return None
            at += len(part)
    return at


class AnswerForm(NamedTuple):
    """The texts around the parts of an answer; empty where there is none.

    `opening` before reasoning, `closing` after it (with white space), `other` the two before tool calls where they
    differ; `header` before a content that nothing precedes;
    `calls`: None where they cannot be told; `content_calls`: calls may follow a content, after `gap` of white space.
    `begun`: with this end of a prompt an answer begins within its reasoning.
    """

    opening: str = ""
    closing: str = ""
    other: tuple[str, str] = ("", "")
    header: str = ""
    begun: str = ""
    calls: CallForm | None = None
    content_calls: bool = False
    gap: str = ""
    tail: str = ""  # between a content and the stop token


def find_form(template: ChatTemplate) -> AnswerForm:
    """The form of a template's answers, as far as its renderings tell."""
    form = AnswerForm()
    plain = template.probe_turn(probe_answer())
    said = "" if plain is None else template.without_stop(plain.answer)
    header, _, tail = said.partition(CONTENT)
    thought = template.probe_turn(probe_answer(reasoning=True))
    if thought is not None:
        before, _, rest = template.without_stop(thought.answer).partition(REASONING)
        between, found, _ = rest.partition(CONTENT)
        if found and between.strip():
            own = between.removesuffix(header) if between.removesuffix(header).strip() else between
            begun = re.search(r"<[^<>]*>\s*$", thought.prompt) if not before.strip() else None
            form = form._replace(opening=before, closing=own, begun="" if begun is None else begun[0])
            if begun is not None:
                form = form._replace(opening=begun[0])
    closes = bool(form.closing) and form.closing.strip() in header  # an empty reasoning is written before the content
    form = form._replace(header="" if closes else header, tail=tail)
    calls = _find_calls(template)
    if calls is None:
        return form
    marks = tuple(mark for mark in (form.opening.strip(), form.closing.strip()) if mark)
    if form.closing and calls.opening.lstrip().startswith(marks):
        calls = _without_reasoning(calls, form)
    form = form._replace(other=_other_reasoning(template, calls, form))
    both = template.probe_turn(probe_answer(calls=1))
    between = "" if both is None else both.answer.partition(CONTENT)[2].partition(NAMES[0])[0]
    joined = bool(between) and between.endswith(calls.opening.lstrip())
    gap = between.removesuffix(calls.opening.lstrip()) if joined else ""
    return form._replace(calls=calls, content_calls=joined and not gap.strip(), gap=gap)


def _without_reasoning(calls: CallForm, form: AnswerForm) -> CallForm:
    """An answer that only calls a tool may begin with an empty reasoning, which is no part of the call."""
    at = calls.opening.rfind(form.closing.strip())
    return replace(calls, opening=calls.opening[at + len(form.closing.strip()) :] if at >= 0 else calls.opening)


def _other_reasoning(template: ChatTemplate, calls: CallForm, form: AnswerForm) -> tuple[str, str]:
    """What is around reasoning that tool calls follow, if not what is around reasoning that a content follows."""
    turn = template.probe_turn(probe_answer(False, reasoning=True, calls=1))
    if turn is None:
        return "", ""
    before, _, rest = template.without_stop(turn.answer).partition(REASONING)
    between = rest.partition(NAMES[0])[0].removesuffix(calls.opening.lstrip())
    same = not before.strip() or (before.strip() == form.opening.strip() and between.strip() == form.closing.strip())
    return ("", "") if same or not between.strip() else (before, between)


def _said(template: ChatTemplate, *arguments: dict[str, Any], checked: bool = True) -> str | None:
    """An answer that calls tools with these arguments."""
    calls = tuple(
        EscapedCall(f"{i:09d}", NAMES[i], own, json.dumps(own, ensure_ascii=False)) for i, own in enumerate(arguments)
    )
    turn = template.probe_turn(probe_answer(False)._replace(calls=calls), checked=checked)
    return None if turn is None else template.without_stop(turn.answer)


def _find_calls(template: ChatTemplate) -> CallForm | None:
    one = _said(template, {KEYS[0]: VALUES[0]})
    two = _said(template, {KEYS[0]: VALUES[0]}, {KEYS[1]: VALUES[1]})
    if one is None or NAMES[0] not in one:
        return None
    opening, _, rest = one.partition(NAMES[0])
    start = rest.find("{")
    while 0 <= start < rest.find(KEYS[0]):
        try:
            value, end = json.JSONDecoder().raw_decode(rest, start)
        except ValueError:
            value, end = None, 0
        if value == {KEYS[0]: VALUES[0]}:
            after, another, closing = _joint(rest[end:], two, VALUES[0] + '"}')
            return JsonCallForm(opening, another, closing, rest[:start], after)
        start = rest.find("{", start + 1)
    return _find_listed(template, opening, rest, two)


def _joint(last: str, two: str | None, end: str) -> tuple[str, str, str]:
    """What ends each call, what is then before another's name, and what ends the last."""
    if two is None:
        return last, "", ""
    between = two[two.index(end) + len(end) : two.index(NAMES[1])]
    shared = between[: common_prefix(between, last)]
    return shared, between[len(shared) :], last[len(shared) :]


def _find_listed(template: ChatTemplate, opening: str, rest: str, two: str | None) -> CallForm | None:
    several = _said(template, {KEYS[0]: VALUES[0], KEYS[1]: VALUES[1]})
    number = _said(template, {KEYS[0]: 7531})
    none = _said(template, {})
    if several is None or number is None or none is None:
        return None
    first, _, rest = rest.partition(KEYS[0])
    equals, _, last = rest.partition(VALUES[0])
    bare, _, bare_last = number.partition(KEYS[0])[2].partition("7531")
    if not bare_last and bare_last != last:
        return None
    left = equals.removeprefix(bare)
    right = last.removesuffix(bare_last)
    comma = several.partition(VALUES[0])[2].partition(KEYS[1])[0].removeprefix(right)
    after, another, closing = _joint(last, two, VALUES[0])
    lines = _said(template, {KEYS[0]: "one\ntwo"}, checked=False)
    escaped = lines is not None and "one\\ntwo" in lines
    empty = none.partition(NAMES[0])[2].removesuffix(closing)
    return ListedCallForm(
        opening, another, closing, first, empty, bare, (left, right), comma, after.removeprefix(right), escaped
    )
