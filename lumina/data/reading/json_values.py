"""JSON values one after another, however they are laid out: arrays, pretty-printed objects, both mixed, `{"data":
[...]}`.

A value that is a record is one; an array holds records, or is itself a conversation when its elements are messages.
Everything is read to its end; where the text is no JSON, the place is a Fault and reading goes on at the next line that
begins a value.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from lumina.data.formats import format_of
from lumina.data.records.fault import BROKEN_JSON, PYTHON_LITERAL, TOO_MUCH_MEMORY, TWICE, WRONG_TYPE, Fault
from lumina.data.records.fields import CONTENT, HARMLESS, NOT_USED, is_empty, plain_name, shortened

TRUNCATED_ARRAY = "truncated array"
MAX_ELEMENT_CHARS = 1 << 26  # a value that does not end within this is broken, not long
WRAPPERS = ("data", "rows", "records", "train")
WRAPPED = re.compile(rf'\{{\s*"(?:{"|".join(WRAPPERS)})"\s*:\s*\[')
_KEY_ENDS = re.compile(rb'":')
_LONGEST_OPENING = 256  # characters in which `{"data": [` has to stand


def parse_json(line: bytes) -> Any:
    """The line's value, or a Fault. JSON, where NaN and infinities are read as null; lone surrogates, invalid UTF-8 and
    keys that stand twice in one object are faults, and so is a value that there is no memory for."""
    try:
        value = orjson.loads(line)
        return value if _has_keys(line, _expected_keys(value)) else _repeated(line, value)
    except orjson.JSONDecodeError as error:
        if b"NaN" in line or b"Infinity" in line:
            try:  # Python's reader knows them; written and read again they are null, and a lone surrogate is an error
                return _repeated(line, orjson.loads(orjson.dumps(json.loads(line.decode("utf-8")))))
            except (ValueError, TypeError, RecursionError):
                pass
        if line.lstrip()[:2] in (b"{'", b"['"):
            return Fault(PYTHON_LITERAL, "write lines with json.dumps, not print or str", raw=line)
        if error.pos == 0 and error.doc and line[:1] in (b"{", b"["):  # where no fault of a text can be
            return Fault(TOO_MUCH_MEMORY, str(error), raw=line)
        return Fault(BROKEN_JSON, str(error), raw=line)


def _has_keys(line: bytes, count: int) -> bool:
    """Whether a line has so many colons, or so many after a quote: replacing and `re` take a fifth and half of the time
    that counting takes, which would be felt."""
    return len(line) - len(line.replace(b":", b"")) == count or len(_KEY_ENDS.findall(line)) == count


def _expected_keys(value: Any) -> int:
    """How many keys a value has whose lists hold objects of no depth, as nearly all records are: fast."""
    if type(value) is not dict:
        return -1
    count = len(value)
    for held in value.values():
        if type(held) is list and held and type(held[0]) is dict:
            try:
                count += sum(map(len, held))
            except TypeError:  # a number among them
                return -1
    return count


def _repeated(line: bytes, value: Any) -> Any:
    """The value of a line, or a Fault where an object in it has a key twice, with two values: the parser keeps the last
    one alone. Other lines come here too: with objects in objects, with `":` in a text, with space before a colon."""
    count, stack = 0, [value]
    while stack:
        held = stack.pop()
        if type(held) is dict:
            count += len(held)
            stack.extend(held.values())
        elif type(held) is list:
            stack.extend(held)
    if line.count(b'":') - line.count(b'\\":') == count:  # a quote within a text is written \"
        return value
    twice: list[str] = []

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, held in found:
            if name in out and out[name] != held and plain_name(name) not in HARMLESS:
                twice.append(name)
            out[name] = held
        return out

    try:
        json.loads(line, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return value
    return Fault(TWICE, f"the key `{twice[0][:40]}` stands twice in one object", raw=line) if twice else value


def is_message(value: Any) -> bool:
    """Whether an element of an array is a turn of a conversation rather than a record."""
    if type(value) is not dict:
        return False
    return (
        ("role" in value or "from" in value)
        and not ({"messages", "conversations", "message_id"} & value.keys())
        and format_of(value) in (None, "text")
    )


def records_in(value: Any) -> list[Any]:
    """What one JSON value holds: itself, the records of a list, one conversation that is a list of messages, a text of
    JSON, or what a single key wraps."""
    try:
        return _records_in(value)
    except RecursionError:
        return [Fault(WRONG_TYPE, "nested too deep")]


def _records_in(value: Any) -> list[Any]:
    if type(value) is list:
        if value and all(map(is_message, value)):
            return [{"messages": value}]
        return [record for part in value for record in (_records_in(part) if type(part) in (list, str) else [part])]
    if type(value) is str and value.lstrip()[:1] in ("{", "["):
        found = parse_json(value.encode("utf-8", "surrogatepass"))
        return [found] if isinstance(found, Fault) else _records_in(found)
    if type(value) is dict and format_of(value) is None:
        wrapped = next((name for name in WRAPPERS if type(value.get(name)) is list), None)
        if wrapped is not None and value[wrapped] and _only_harmless(value, wrapped):
            return _records_in(value[wrapped])
    return [value]


def several(line: bytes) -> list[Any]:
    """The values of a line that holds several, one after another; none when some of it is something else."""
    scan = json.JSONDecoder().raw_decode
    values, at = [], 0
    try:
        text = line.decode("utf-8").strip()
        while at < len(text):
            _, end = scan(text, at)
            values.append(parse_json(text[at:end].encode()))
            while end < len(text) and text[end] in " \t\r\n,":
                end += 1
            at = end
    except (ValueError, RecursionError):
        return []
    return values if values and not any(isinstance(value, Fault) for value in values) else []


def _only_harmless(value: Mapping[str, Any], besides: str) -> bool:
    return all(name == besides or _says_nothing(name, held) for name, held in value.items())


def _says_nothing(name: str, held: Any) -> bool:
    """Whether what stands beside the records holds no content: numbers, and keys that are no content."""
    return is_empty(held) or name in HARMLESS or (name not in CONTENT and not isinstance(held, list | dict))


def read_values(chunks: Iterator[bytes | Fault]) -> Iterator[tuple[int, int, Any]]:
    """(number from 1, bytes, record) of every record. A record that cannot be read is a Fault."""
    return _Values(chunks).read()


class _Values:
    """A reader's place in the text: `text[at:]` is what comes next, `inside` an array or not."""

    def __init__(self, chunks: Iterator[bytes | Fault]) -> None:
        self.chunks = chunks
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.scan = json.JSONDecoder().raw_decode
        self.text, self.at = "", 0
        self.ended = self.inside = self.wrapped = False
        self.number = 0
        self.wanted = 0  # characters that the next value has at least, as far as is known
        self.indent = ""  # before the value that comes next
        self.turns: list[Any] = []  # of an array that is a conversation
        self.failure: Fault | None = None

    def read(self) -> Iterator[tuple[int, int, Any]]:
        while self._skip():
            character = self.text[self.at]
            if not self.inside and self._opens(character):
                continue
            if self.inside and character == "]":
                self.at, self.inside = self.at + 1, False
                if self.turns:
                    yield self._next(0, {"messages": self.turns})
                    self.turns = []
                if self.wrapped and (fault := self._close()) is not None:
                    yield self._next(0, fault)
                continue
            found = self._value()
            if isinstance(found, Fault):
                yield self._next(0, found)
                self.turns.clear()
                if not self._go_on():
                    return
                continue
            yield from self._records(found)
        if self.inside:
            yield self._next(0, self.failure or Fault(TRUNCATED_ARRAY, f"after element {self.number}"))
        elif self.failure is not None:
            yield self._next(0, self.failure)

    def _next(self, size: int, record: Any) -> tuple[int, int, Any]:
        self.number += 1
        return self.number, size, record

    def _records(self, element: str) -> Iterator[tuple[int, int, Any]]:
        size = len(element)
        value = parse_json(element.encode("utf-8", "surrogateescape"))
        if self.inside and is_message(value):
            self.turns.append(value)
            return
        for record in [value] if isinstance(value, Fault) else records_in(value):
            yield self._next(size, record)
            size = 0

    def _more(self) -> None:
        chunk = next(self.chunks, None)
        self.ended = not isinstance(chunk, bytes)
        if isinstance(chunk, Fault):
            self.failure = chunk
        more = self.decoder.decode(chunk if isinstance(chunk, bytes) else b"", self.ended)
        self.text, self.at = self.text[self.at :] + more, 0

    def _skip(self) -> bool:
        """Go to the next character that means something; False at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n,\ufeff":
                character = self.text[self.at]
                self.indent = "" if character in "\r\n,\ufeff" else self.indent + character
                self.at += 1
            if self.at < len(self.text):
                return True
            if self.ended:
                return False
            self._more()

    def _opens(self, character: str) -> bool:
        """Enter an array, or an object that wraps one."""
        if character == "{":
            while len(self.text) - self.at < _LONGEST_OPENING and not self.ended:
                self._more()
            opening = WRAPPED.match(self.text, self.at)
            if opening is None:
                return False
            self.at, self.wrapped = opening.end(), True
        elif character == "[":
            self.at += 1
        else:
            return False
        self.inside = True
        return True

    def _value(self) -> str | Fault:
        """The text of the value that begins here, or what is wrong with it."""
        while True:
            try:
                if len(self.text) - self.at < self.wanted and not self.ended:
                    raise IndexError
                _, end = self.scan(self.text, self.at)
                if end == len(self.text) and not self.ended:
                    raise IndexError  # a number may go on
            except (json.JSONDecodeError, IndexError, RecursionError) as error:
                if self.ended or isinstance(error, RecursionError) or len(self.text) - self.at > MAX_ELEMENT_CHARS:
                    reason = TRUNCATED_ARRAY if self.inside else BROKEN_JSON
                    return self.failure or Fault(reason, f"after element {self.number}: {error}")
                if isinstance(error, json.JSONDecodeError):
                    if self._is_wrong(error):
                        reason = TRUNCATED_ARRAY if self.inside else BROKEN_JSON
                        return Fault(reason, f"after element {self.number}: {error}")
                    self.wanted = 2 * (len(self.text) - self.at)  # so that a long value is scanned a few times
                self._more()
                continue
            except ValueError as error:  # a number of thousands of digits
                return Fault(BROKEN_JSON, f"after element {self.number}: {error}")
            element = self.text[self.at : end]
            self.at, self.wanted = end, 0
            return element

    def _is_wrong(self, error: json.JSONDecodeError, start: int = 0) -> bool:
        """Whether more text cannot complete the value, which was scanned from `start`: the error is well before the
        text's end, and no open string."""
        # json has one exception type for all errors and no code: that a string is open stands in its message alone.
        return not error.msg.startswith("Unterminated") and start + error.pos < len(self.text) - 64

    def _go_on(self) -> bool:
        """After broken text: move to the next line that begins a value. False when there is none."""
        # Not what stands deeper, which is a part of the broken value.
        following = re.compile(rf"\n[ \t]{{0,{len(self.indent)}}}(?=[{{\[])")
        while True:
            found = following.search(self.text, self.at + 1)
            if found is not None:
                self.at, self.wanted = found.end(), 0
                return True
            if self.ended:
                return False
            self.at = max(self.at, len(self.text) - len(self.indent) - 2)
            self._more()

    def _close(self) -> Fault | None:
        """Past the rest of an object that wrapped the array: keys without content."""
        self.wrapped = False
        while True:
            rest = self.text[self.at :].lstrip()
            if rest[:1] == "}":
                self.at += self.text[self.at :].index("}") + 1
                return None
            if rest[:1] == ",":
                begin = self.at + self.text[self.at :].index(",")
                try:
                    others, length = self.scan("{" + self.text[begin + 1 :])
                except (ValueError, RecursionError) as error:
                    size = len(self.text) - begin
                    if (
                        self.ended
                        or size > MAX_ELEMENT_CHARS
                        or not isinstance(error, json.JSONDecodeError)
                        or self._is_wrong(error, begin)
                    ):
                        self.at = begin
                        if not self._go_on():
                            self.at = len(self.text)
                        return Fault(BROKEN_JSON, f"after element {self.number}: {error}")
                    while len(self.text) - self.at < 2 * size and not self.ended:  # a long value is scanned a few times
                        self._more()
                else:
                    self.at = begin + length
                    held = [name for name in others if not _says_nothing(name, others[name])]
                    return Fault(f"{NOT_USED}: {shortened(held[0])}", "it stands beside the records") if held else None
            elif self.ended:
                return Fault(BROKEN_JSON, f"after element {self.number}: the object around it does not end")
            elif rest:
                return Fault(BROKEN_JSON, f"after element {self.number}: {rest[:20]!r}")
            self._more()
