"""ShareGPT: `{"conversations": [{"from", "value"}, …], "system"?}`."""

from __future__ import annotations

from typing import Any

from lumina.chat.template import Conversation
from lumina.data.formats._fault import TWICE, WRONG_TYPE, Fault, kind
from lumina.data.formats._fields import FieldTally, Vocabulary, one_of
from lumina.data.formats.messages import conversation, listed, settle

KEYS = ("conversations", "conversation")
RECORD = Vocabulary("ShareGPT", frozenset({*KEYS, "system"}))


def from_sharegpt(record: dict[str, Any], tally: FieldTally) -> Conversation | Fault:
    """A record's turns, in any of the shapes that messages have."""
    name, twice = one_of(record, KEYS)
    assert name is not None
    if twice:
        return Fault(TWICE, "`conversations` and `conversation` differ")
    raw = listed(record[name])
    if type(raw) is not list:
        return Fault(WRONG_TYPE, f"`{name}` is {kind(raw)}, not a list")
    messages = conversation(raw, tally)
    if isinstance(messages, Fault):
        return messages
    return settle(record, messages, tally, RECORD)
