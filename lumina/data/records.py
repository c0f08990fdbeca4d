"""One record of a file -> a Conversation, or a Fault that says why not.

`Fault.reason` is a short fixed phrase, the key under which faults are counted; `detail` is for a person reading one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from lumina.chat.template import ROLE_ALIASES, TEXT_ROLE, Conversation, Message
from lumina.data.oasst import Options, extract, malformed

BROKEN_JSON = "broken JSON"
WRONG_TYPE = "wrong type"
EMPTY = "empty"
UNKNOWN_ROLE = "unknown role"
NO_ASSISTANT = "no assistant turn"
UNKNOWN_FORMAT = "unknown format"
OTHER_FORMAT = "another format than the one given"

SHAREGPT_ROLES = {
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "user",
    "observation": "user",
    "function_response": "user",
}


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


def parse_json(line: bytes) -> Any:
    """The line's value, or a Fault. Strict JSON: NaN, lone surrogates and invalid UTF-8 are faults."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Fault(BROKEN_JSON, str(error), raw=line)


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
        role, content, weight = item.get("role"), item.get("content"), item.get("weight")
        if weight is None:
            weight = 1
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
    return Conversation(messages, _identity(record))


def from_text(record: dict[str, Any]) -> Conversation | Fault:
    """`{"text"}`: a plain text, all of it learned."""
    text = record["text"]
    if type(text) is not str:
        return Fault(WRONG_TYPE, f"`text` is {_kind(text)}, not a string", 1)
    if not text or text.isspace():
        return Fault(EMPTY, "no text", 1)
    return Conversation([Message(TEXT_ROLE, text)], _identity(record))


def from_sharegpt(record: dict[str, Any]) -> Conversation | Fault:
    """ShareGPT: `{"conversations": [{"from", "value"}], "system"?}`. A tool's output is context for the assistant, as
    a user's words are; the template has no role of its own for it."""
    raw = record["conversations"]
    if type(raw) is not list:
        return Fault(WRONG_TYPE, f"`conversations` is {_kind(raw)}, not a list")
    turns: list[Any] = []
    for item in raw:
        if type(item) is not dict:
            turns.append(item)
            continue
        role = item["from"] if item.get("from") is not None else item.get("role")
        content = item["value"] if item.get("value") is not None else item.get("content")
        role = SHAREGPT_ROLES.get(role, role) if type(role) is str else role
        turns.append({"role": role, "content": content, "weight": item.get("weight")})
    return from_messages({**record, "messages": [*_system(record), *turns]})


def from_instruction(record: dict[str, Any]) -> Conversation | Fault:
    """Alpaca: `{"instruction", "input"?, "output", "system"?}`. The input comes after a blank line."""
    parts = [record["instruction"], record.get("input") or ""]
    wrong = [part for part in parts if type(part) is not str]
    question: Any = wrong[0] if wrong else "\n\n".join(part for part in parts if part.strip())
    return _pair(record, question, record.get("output"))


def from_prompt(record: dict[str, Any]) -> Conversation | Fault:
    """`{"prompt", "response" | "completion"}`, each a string or a list of messages (TRL)."""
    prompt = record["prompt"]
    answer = _answer(record)
    if type(prompt) is list and type(answer) is list:
        return from_messages({**record, "messages": [*prompt, *answer]})
    return _pair(record, prompt, answer)


def _answer(record: dict[str, Any]) -> Any:
    return record["response"] if record.get("response") is not None else record.get("completion")


def _pair(record: dict[str, Any], question: Any, answer: Any) -> Conversation | Fault:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return from_messages({**record, "messages": [*_system(record), *turns]})


def _system(record: dict[str, Any]) -> list[dict[str, Any]]:
    system = record.get("system")
    return [{"role": "system", "content": system}] if type(system) is str and system.strip() else []


def _identity(record: dict[str, Any]) -> str:
    """What must stay on one side of a split: the tree's or the conversation's id."""
    for key in ("tree_id", "id"):
        identity = record.get(key)
        if identity is not None:
            return str(identity)
    return ""


def is_flat_oasst(record: Any) -> bool:
    """Whether a record is a single OASST message, linked to its tree by parent_id."""
    return (
        type(record) is dict
        and type(record.get("message_id")) is str
        and type(record.get("text")) is str
        and type(record.get("role")) is str
        and "replies" not in record
    )


def from_tree(record: dict[str, Any]) -> Tree | Fault:
    """An OASST tree: every thread that the default options take (`lumina process-oasst` has the others)."""
    reason = malformed(record)
    if reason is not None:
        return Fault(WRONG_TYPE, f"an OASST tree with {reason}")
    extraction = extract(record, Options())
    conversations = []
    for thread in extraction.records:
        found = from_messages(thread)
        if isinstance(found, Fault):
            extraction.discarded[found.reason] += 1
        else:
            conversations.append(found)
    return Tree(conversations, extraction.discarded)


FORMATS: tuple[tuple[str, str, Callable[[dict[str, Any]], Conversation | Fault | Tree]], ...] = (
    # The key that tells it, its name, its converter; the first key present decides.
    ("messages", "messages", from_messages),
    ("conversations", "ShareGPT", from_sharegpt),
    ("instruction", "Alpaca", from_instruction),
    ("text", "text", from_text),
)


def format_of(record: Any) -> str | None:
    """The name of a record's format, None when it has none of ours."""
    if type(record) is not dict:
        return None
    if type(record.get("prompt")) is dict:
        return "OASST tree"
    if record.get("prompt") is not None and _answer(record) is not None:
        return "prompt and response"
    return next((name for key, name, _ in FORMATS if record.get(key) is not None), None)


# What a source's `format` may say: the key that such a record must have, and its converter.
NAMED: dict[str, tuple[str, Callable[[dict[str, Any]], Conversation | Fault | Tree]]] = {
    "messages": ("messages", from_messages),
    "sharegpt": ("conversations", from_sharegpt),
    "alpaca": ("instruction", from_instruction),
    "prompt": ("prompt", from_prompt),
    "oasst": ("prompt", from_tree),
    "text": ("text", from_text),
}


def convert(record: Any, given: str = "") -> Conversation | Fault | Tree:
    """A parsed record -> a conversation (a tree: several), by the keys it has, or as the format `given` (see NAMED)."""
    if given and type(record) is dict:
        key, converter = NAMED[given]
        if record.get(key) is None or (type(record[key]) is dict) != (given == "oasst"):
            return Fault(OTHER_FORMAT, f"not the format given, {given}")
        return converter(record)
    if type(record) is dict:
        if type(record.get("messages")) is list:  # by far the most frequent
            return from_messages(record)
        if type(record.get("prompt")) is dict:
            return from_tree(record)
        if record.get("prompt") is not None and _answer(record) is not None:
            return from_prompt(record)
        for key, _, converter in FORMATS:
            if record.get(key) is not None:
                return converter(record)
        keys = ", ".join(sorted(map(str, record))[:6])
        return Fault(UNKNOWN_FORMAT, f"none of our formats has the keys it has ({keys[:120]})")
    if type(record) is Fault:
        return record
    return Fault(WRONG_TYPE, f"the record is {_kind(record)}, not an object")


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
