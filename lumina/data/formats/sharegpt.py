"""ShareGPT: `{"conversations": [{"from", "value"}, …], "system"?, "tools"?}`."""

from __future__ import annotations

from typing import Any

from lumina.chat import Conversation
from lumina.data.formats._format import DataFormat, has
from lumina.data.records.calls import TOOLS
from lumina.data.records.chats import decoded
from lumina.data.records.fault import TWICE, WRONG_TYPE, Fault, kind
from lumina.data.records.fields import FieldTally, Vocabulary, one_of
from lumina.data.records.turns import SYSTEMS, to_conversation, to_messages

KEYS = ("conversations", "conversation")
RECORD = Vocabulary("ShareGPT", frozenset({*KEYS, *SYSTEMS, *TOOLS}))


def from_sharegpt(record: dict[str, Any], tally: FieldTally) -> Conversation | Fault:
    """A record's turns, in any of the shapes that messages have."""
    name, twice = one_of(record, KEYS)
    assert name is not None
    if twice:
        return Fault(TWICE, "`conversations` and `conversation` differ")
    raw = decoded(record[name])
    if type(raw) is not list:
        return raw if isinstance(raw, Fault) else Fault(WRONG_TYPE, f"`{name}` is {kind(raw)}, not a list")
    messages = to_messages(raw, tally)
    if isinstance(messages, Fault):
        return messages
    return to_conversation(record, messages, tally, RECORD)


FORMAT = DataFormat("ShareGPT", from_sharegpt, recognise=((50, has(*KEYS)),), required=has(*KEYS))
