"""`{"text"}`: a plain text, all of it supervised."""

from __future__ import annotations

from typing import Any

from lumina.chat import TEXT_ROLE, Conversation, Message
from lumina.data.formats._format import DataFormat, has
from lumina.data.records.chats import decoded
from lumina.data.records.fault import EMPTY, UNKNOWN_FORMAT, WRONG_TYPE, Fault, kind
from lumina.data.records.fields import FieldTally, Vocabulary
from lumina.data.records.turns import group_id

RECORD = Vocabulary("text", frozenset({"text"}))


def from_text(record: dict[str, Any], tally: FieldTally) -> Conversation | Fault:
    if record.get("role") is not None or record.get("from") is not None or record.get("type") == "text":
        return Fault(UNKNOWN_FORMAT, "a single message, not a record", 1)
    text = record["text"]
    if type(text) is not str:
        return Fault(WRONG_TYPE, f"`text` is {kind(text)}, not a string", 1)
    if type(decoded(text)) is not str:
        return Fault(UNKNOWN_FORMAT, "`text` holds messages, not a text: --columns messages=text", 1)
    if not text or text.isspace():
        return Fault(EMPTY, "no text", 1)
    messages = [Message(TEXT_ROLE, text)]
    fault = tally.count(RECORD, record, messages)
    return fault if fault is not None else Conversation(messages, group_id(record))


FORMAT = DataFormat("text", from_text, recognise=((80, has("text")),), required=has("text"))
