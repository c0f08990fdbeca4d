"""`{"messages": [{"role", "content"}, …], "system"?, "tools"?}`: OpenAI's, TRL's and Hugging Face's chat format."""

from __future__ import annotations

from typing import Any

from lumina.chat import Conversation
from lumina.data.formats._format import DataFormat, has
from lumina.data.records.calls import TOOLS
from lumina.data.records.chats import decoded
from lumina.data.records.fault import WRONG_TYPE, Fault, kind
from lumina.data.records.fields import FieldTally, Vocabulary
from lumina.data.records.turns import SYSTEMS, to_conversation, to_messages

RECORD = Vocabulary("messages", frozenset({"messages", *SYSTEMS, *TOOLS}))


def from_messages(record: dict[str, Any], tally: FieldTally) -> Conversation | Fault:
    """The conversation of a record with `messages`; its `system` comes first where the messages have none."""
    raw = decoded(record["messages"])
    if type(raw) is not list:
        return raw if isinstance(raw, Fault) else Fault(WRONG_TYPE, f"`messages` is {kind(raw)}, not a list")
    messages = to_messages(raw, tally)
    if isinstance(messages, Fault):
        return messages
    return to_conversation(record, messages, tally, RECORD)


# A list of messages is what it says, whatever stands beside it; a text of JSON may also be a column beside a prompt.
FORMAT = DataFormat(
    name="messages",
    convert=from_messages,
    recognise=((10, lambda record: type(record.get("messages")) is list), (40, has("messages"))),
    required=has("messages"),
)
