"""One record of a file -> a Conversation, or a Fault that says why not.

`Fault.reason` is a short fixed phrase, the key under which faults are counted; `detail` is for a person reading one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from lumina.chat.template import ROLE_ALIASES, TEXT_ROLE, Conversation, Message

BROKEN_JSON = "broken JSON"
WRONG_TYPE = "wrong type"
EMPTY = "empty"
UNKNOWN_ROLE = "unknown role"
NO_ASSISTANT = "no assistant turn"
UNKNOWN_FORMAT = "unknown format"


@dataclass(slots=True, frozen=True)
class Fault:
    """Why a record is skipped, and how many messages it held as far as one can tell."""

    reason: str
    detail: str
    messages: int = 0


def parse_json(line: bytes) -> Any:
    """The line's value, or a Fault. Strict JSON: NaN, lone surrogates and invalid UTF-8 are faults."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Fault(BROKEN_JSON, str(error))


def content_text(content: Any) -> str | None:
    """A message's text: a string, or OpenAI-style parts of type text joined; None for anything else."""
    if type(content) is str:
        return content
    if type(content) is not list:
        return None
    texts = []
    for part in content:
        if type(part) is dict and part.get("type", "text") == "text" and type(part.get("text")) is str:
            texts.append(part["text"])
        elif type(part) is str:
            texts.append(part)
        else:
            return None
    return "".join(texts)


def from_messages(record: dict[str, Any]) -> Conversation | Fault:
    """`{"messages": [{"role", "content", "weight"?}], "id"?}`.

    `weight` 0 on an assistant message keeps it as context that is not learned (OpenAI's fine-tuning format).
    """
    raw = record["messages"]
    if type(raw) is not list:
        return Fault(WRONG_TYPE, f"`messages` is {_kind(raw)}, not a list")
    messages, learn_any = [], False
    for number, item in enumerate(raw, 1):
        if type(item) is not dict:
            return Fault(WRONG_TYPE, f"message {number} is {_kind(item)}, not an object", len(raw))
        role, content, weight = item.get("role"), item.get("content"), item.get("weight", 1)
        if type(content) is not str:
            content = content_text(content)
        if type(role) is not str or content is None or weight not in (0, 1):
            what = "role" if type(role) is not str else "content" if content is None else "weight"
            return Fault(WRONG_TYPE, f"message {number}: `{what}` is {_kind(item.get(what))}", len(raw))
        known = ROLE_ALIASES.get(role)
        if known is None:
            return Fault(UNKNOWN_ROLE, f"message {number}: role {role[:40]!r}", len(raw))
        if not content or content.isspace():
            return Fault(EMPTY, f"message {number} has no content", len(raw))
        learn_any = learn_any or (known == "assistant" and bool(weight))
        messages.append(Message(known, content, bool(weight)))
    if not messages:
        return Fault(EMPTY, "no messages")
    if not learn_any:
        return Fault(NO_ASSISTANT, "no assistant message to learn from", len(raw))
    identity = record.get("id", "")
    return Conversation(messages, identity if type(identity) is str else str(identity))


def from_text(record: dict[str, Any]) -> Conversation | Fault:
    """`{"text"}`: a plain text, all of it learned."""
    text = record["text"]
    if type(text) is not str:
        return Fault(WRONG_TYPE, f"`text` is {_kind(text)}, not a string", 1)
    if not text or text.isspace():
        return Fault(EMPTY, "no text", 1)
    return Conversation([Message(TEXT_ROLE, text)], str(record.get("id", "")))


def convert(record: Any) -> Conversation | Fault:
    """A parsed record -> a conversation, by the keys it has."""
    if type(record) is Fault:
        return record
    if type(record) is not dict:
        return Fault(WRONG_TYPE, f"the record is {_kind(record)}, not an object")
    if "messages" in record:
        return from_messages(record)
    if "text" in record:
        return from_text(record)
    keys = ", ".join(sorted(map(str, record))[:6])
    return Fault(UNKNOWN_FORMAT, f"no `messages` or `text` among its keys ({keys})")


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
