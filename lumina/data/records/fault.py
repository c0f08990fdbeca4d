"""Why a record cannot be used. `Fault.reason` is a short fixed phrase, the key under which faults are counted; `detail`
is for a person who reads one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from lumina.chat import Conversation

BROKEN_JSON = "broken JSON"
TOO_MUCH_MEMORY = "takes too much memory"
PYTHON_LITERAL = "a Python literal, not JSON"
WRONG_TYPE = "wrong type"
EMPTY = "empty"
UNKNOWN_ROLE = "unknown role"
NO_ASSISTANT = "no assistant turn"
NOT_TO_BE_TAUGHT = "label is false: no answer to teach"
UNKNOWN_FORMAT = "unknown format"
OTHER_FORMAT = "another format than the one given"
TWICE = "two fields for one thing"
BAD_TOOL = "tool without a name"
BAD_CALL = "tool call without a name"
BAD_ARGUMENTS = "tool call whose arguments are no JSON object"
OUT_OF_ORDER = "parts in another order than reasoning, content, tool calls"


@dataclass(slots=True, frozen=True)
class Fault:
    """Why a record is skipped, how many messages it held as far as one can tell, and its bytes if it is no JSON."""

    reason: str
    detail: str
    messages: int = 0
    raw: bytes = b""

    def example(self) -> str:
        """The detail, with the beginning of what was read, for a person."""
        start = self.raw[:60].decode("utf-8", "backslashreplace").strip()
        return f"{self.detail}: {start!r}" if start else self.detail


BLANK = Fault("blank line", "")


class Tree(NamedTuple):
    """The conversations of one OASST tree, and its discarded paths by reason."""

    conversations: list[Conversation]
    discarded: Counter[str]


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
