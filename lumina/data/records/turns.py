"""Message objects -> messages: what every data format of conversations is turned into.

An assistant's message may have reasoning and tool calls beside its content, or as parts of it; a system message may
declare tools; a tool's result is a message of role tool, or a part of the user's. A message may carry a flag that says
whether it is supervised (`weight`, as OpenAI's fine-tuning has it, `train`, `training`, `trainable`, `loss`,
`loss_mask` …), or `train_detail`, spans of its content that are not (axolotl's form, both ends counted).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import orjson

from lumina.chat import ROLE_ALIASES, Conversation, Message, ToolCall
from lumina.data.records.calls import CALLS, TOOLS, calls_of, same_calls, tools_of
from lumina.data.records.fault import EMPTY, NO_ASSISTANT, TWICE, UNKNOWN_ROLE, WRONG_TYPE, Fault, kind
from lumina.data.records.fields import FieldTally, Vocabulary, is_empty, one_of
from lumina.data.records.flags import FLAGS, MASKS
from lumina.data.records.parts import (
    CALL,
    REASONING,
    RESULT,
    TEXT,
    THOUGHT,
    Part,
    content_parts,
    content_text,
    in_order,
    only_text,
    reasoning_text,
    result_message,
    result_text,
)

_USED = frozenset({"role", "from", "content", "value", "text", "refusal", "train_detail", *FLAGS, *MASKS})
_FIELDS = {
    "user": Vocabulary("a user's message", _USED),
    "assistant": Vocabulary("an assistant's message", _USED | {*CALLS, *REASONING}),
    "system": Vocabulary("a system message", _USED | {*TOOLS}),
    "tool": Vocabulary("a tool's message", _USED - {"refusal", "train_detail"}),
}
EMPTY_SYSTEM, EMPTY_LAST = "empty system message", "empty last answer"
_CALL_ROLES = ("function_call", "tool_call", "tool_calls")  # their content is JSON of the assistant's calls
_RESULT_ROLES = (
    *("tool", "observation", "function", "ipython", "function_response", "tool_response", "tool_result", "tool_output"),
    *("function_result", "function_output"),
)
_OF_ASSISTANT = frozenset({*CALLS, *REASONING})
_SAYS = frozenset({"content", "value", "text", "refusal", *_OF_ASSISTANT})
_TOOLS = frozenset(TOOLS)
_FLAGS = frozenset({*FLAGS, *MASKS})
SYSTEMS = ("system", "system_prompt", "system_message")  # what a record calls its own system message
_SYSTEMS = frozenset(SYSTEMS)
# Message(role, content), without the call in Python that a NamedTuple's is: with it, this took a third longer.
_message = partial(tuple.__new__, Message)
_NOTHING_BESIDE = Message("", "")[2:]

_PLAIN_ROLES = ROLE_ALIASES | {
    **dict.fromkeys(("gpt", "chatgpt", "model", "chatbot"), "assistant"),
    **dict.fromkeys(_RESULT_ROLES, "tool"),
    "developer": "system",
}
ROLES = _PLAIN_ROLES | dict.fromkeys(_CALL_ROLES, "assistant")  # beside the aliases of lumina.chat


def to_conversation(
    record: dict[str, Any], messages: Sequence[Message], tally: FieldTally, vocabulary: Vocabulary
) -> Conversation | Fault:
    """The conversation of these messages after the record's own `system` and with its tools, when every field of the
    record has a place and something is supervised."""
    if not _SYSTEMS.isdisjoint(record):
        opening = system_message(record, messages, tally)
        if isinstance(opening, Fault):
            return opening
        messages = [*opening, *messages]
    if not messages:
        return Fault(EMPTY, "no messages")
    for message in messages:
        if message.supervise and message.role == "assistant":
            break
    else:
        reason = EMPTY if EMPTY_LAST in tally.left_out else NO_ASSISTANT
        return Fault(reason, "no assistant message that is supervised", len(messages) + len(tally.left_out))
    fault = tally.count(vocabulary, record, messages)
    if fault is not None:
        return Fault(fault.reason, fault.detail, fault.messages + len(tally.left_out))
    if not tally.tools and _TOOLS.isdisjoint(record):  # by far the most frequent
        return Conversation(messages, group_id(record))
    tools = declared_tools(record, tally)
    if isinstance(tools, Fault):
        return Fault(tools.reason, tools.detail, len(messages) + len(tally.left_out))
    return Conversation(messages, group_id(record), tools=tools)


def declared_tools(record: dict[str, Any], tally: FieldTally) -> tuple[str, ...] | Fault:
    """The tools that a record or its system message declares, in one place or alike in several."""
    declared = list(tally.tools)
    for name in TOOLS:
        found = tools_of(record.get(name), name)
        if isinstance(found, Fault):
            return found
        declared.append(found)
    declared = [tools for tools in declared if tools]
    if any(not _alike(tools, declared[0]) for tools in declared[1:]):
        return Fault(TWICE, "the tools stand in two places that differ")
    return declared[0] if declared else ()


def _alike(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether the tools are the same, whatever the order of their keys."""
    return one == other or list(map(orjson.loads, one)) == list(map(orjson.loads, other))


def group_id(record: dict[str, Any]) -> str:
    """What must stay on one side of a split: the tree's or the conversation's id."""
    for key in ("tree_id", "id"):
        found = record.get(key)
        if found is not None:
            return str(found)
    return ""


def to_messages(raw: Sequence[Any], tally: FieldTally) -> list[Message] | Fault:
    """A list of message objects -> messages. What is left out, empty system messages and an empty last answer, goes to
    `tally.left_out`."""
    messages: list[Message] = []
    plain = 0
    sharegpt = bool(raw) and type(raw[0]) is dict and "from" in raw[0]
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    for number, item in enumerate(raw, 1):
        if type(item) is dict and len(item) == 2:  # by far the most frequent
            try:
                known, content = _PLAIN_ROLES[item[role_key]], item[content_key]
            except (KeyError, TypeError):  # another key; a role that is no text
                pass
            else:
                if type(content) is str and content and not content.isspace():
                    messages.append(_message((known, content) + _NOTHING_BESIDE))  # noqa: RUF005 (slower)
                    plain += 1
                    continue
        found = messages_of(item, tally)
        if isinstance(found, Fault):
            if found.reason == EMPTY and number == len(raw) and _PLAIN_ROLES.get(str(_role(item))) == "assistant":
                tally.left_out.append(EMPTY_LAST)
                continue
            return Fault(found.reason, f"message {number}: {found.detail}", len(raw))
        messages += found
    if sharegpt:
        tally.plain_turns += plain
    else:
        tally.plain_messages += plain
    return messages


def messages_of(item: Any, tally: FieldTally) -> list[Message] | Fault:
    """The messages of one object: one; none of an empty system message, which says nothing; several of a user's whose
    parts are tool results."""
    if type(item) is not dict:
        return Fault(WRONG_TYPE, f"it is {kind(item)}, not an object")
    role = _role(item)
    if isinstance(role, Fault):
        return role
    known = ROLES[role]
    learn = _flag(item)
    if isinstance(learn, Fault):
        return learn
    name, twice = one_of(item, ("content", "value", "text", "refusal"))
    if twice:
        return Fault(TWICE, "its text stands in two fields that differ")
    content = item[name] if name is not None else None
    if known == "assistant":
        found: list[Message] | Fault = _answer(item, role, content, learn, tally)
    elif known != "user" and _SAYS.isdisjoint(item) and _TOOLS.isdisjoint(item):
        return Fault(WRONG_TYPE, "it has no `content`")  # null is an empty one; none may stand under another key
    elif known == "tool":
        text = result_text(content, tally)
        found = text if isinstance(text, Fault) else [result_message(item, text, learn)]
    else:
        found = _asked(item, known, content, learn, tally)
    if isinstance(found, Fault) and found.reason != EMPTY:
        return found
    fault = tally.count(_FIELDS[known], item, [] if isinstance(found, Fault) else found)
    return found if fault is None else fault


def _role(item: dict[str, Any]) -> str | Fault:
    """A message's role, one of ROLES."""
    role = item["role"] if item.get("role") is not None else item.get("from")
    if None not in (item.get("role"), item.get("from")) and item["role"] != item["from"]:
        return Fault(TWICE, "`role` and `from` differ")
    if type(role) is not str:
        return Fault(WRONG_TYPE, f"`role` is {kind(role)}")
    plain = role.strip().lower()
    return plain if plain in ROLES else Fault(UNKNOWN_ROLE, f"role {role[:40]!r}")


def _parts(content: Any, tally: FieldTally) -> list[Part] | Fault:
    """What a content holds; a Fault where that is nothing that can be read."""
    if type(content) is str:
        return [(TEXT, content)]
    parts = content_parts(content, tally)
    return Fault(WRONG_TYPE, f"`content` is {kind(content)}") if parts is None else parts


def _asked(item: dict[str, Any], role: str, content: Any, learn: bool, tally: FieldTally) -> list[Message] | Fault:
    """A user's or a system message, and the tool results that a user's has among its parts."""
    parts = [] if content is None and role == "system" else _parts(content, tally)
    if isinstance(parts, Fault):
        return parts
    if role == "system":
        for name in () if _TOOLS.isdisjoint(item) else TOOLS:
            tools = tools_of(item.get(name), name)
            if isinstance(tools, Fault):
                return tools
            tally.tools.append(tools)
    found: list[Message] = []
    run: list[Part] = []
    for part in (*parts, None):
        if part is not None and (part[0] != RESULT or role == "system"):
            run.append(part)
            continue
        text = only_text(run)
        if isinstance(text, Fault):
            return text
        masked = _masked(item.get("train_detail"), text)
        if isinstance(masked, Fault):
            return masked
        if text and not text.isspace():
            found.append(Message(role, text, learn and not _covers(masked, text), masked))
        if part is not None:
            found.append(part[1])
        run = []
    if not found and role == "system":
        tally.left_out.append(EMPTY_SYSTEM)
    elif not found:
        return Fault(EMPTY, f"{role} message without content")
    return found


def _answer(item: dict[str, Any], role: str, content: Any, learn: bool, tally: FieldTally) -> list[Message] | Fault:
    """An assistant's message: reasoning, content and tool calls, each of which may be missing beside another."""
    parts: list[Part] | Fault = []
    calls: tuple[ToolCall, ...] | Fault = ()
    if role in _CALL_ROLES:
        calls = calls_of(content, tally)
    elif content is not None:
        parts = _parts(content, tally)
    if isinstance(parts, Fault):
        return parts
    if isinstance(calls, Fault):
        return calls
    fault = in_order(parts)
    if fault is not None:
        return fault
    text = only_text([part for part in parts if part[0] not in (THOUGHT, CALL)])
    if isinstance(text, Fault):
        return text
    masked = _masked(item.get("train_detail"), text)
    if isinstance(masked, Fault):
        return masked
    reasoning = _reasoning(item, "".join(said for sort, said in parts if sort == THOUGHT), tally)
    if isinstance(reasoning, Fault):
        return reasoning
    calls = _calls(item, (*calls, *(call for sort, call in parts if sort == CALL)), tally)
    if isinstance(calls, Fault):
        return calls
    text, reasoning = ("" if is_empty(said) else said for said in (text, reasoning))
    if not text and not reasoning and not calls:
        if _SAYS.isdisjoint(item):
            return Fault(WRONG_TYPE, "it has no `content`")
        return Fault(EMPTY, "assistant message without content")
    supervise = learn and not (_covers(masked, text) and not reasoning and not calls)
    return [Message("assistant", text, supervise, masked, reasoning, calls)]


def _reasoning(item: dict[str, Any], said: str, tally: FieldTally) -> str | Fault:
    """An assistant's reasoning, from its own field or from the parts of the content (`said`)."""
    for name in () if _OF_ASSISTANT.isdisjoint(item) else REASONING:
        if is_empty(item.get(name)):
            continue
        text = reasoning_text(item[name], name, tally)
        if isinstance(text, Fault):
            return text
        if said.strip() and text.strip() and said.strip() != text.strip():
            return Fault(TWICE, "the reasoning stands in two fields that differ")
        said = said if said.strip() else text
    return said


def _calls(item: dict[str, Any], said: tuple[ToolCall, ...], tally: FieldTally) -> tuple[ToolCall, ...] | Fault:
    """An assistant's tool calls, from its own field or from elsewhere (`said`)."""
    for name in () if _OF_ASSISTANT.isdisjoint(item) else CALLS:
        calls = calls_of(item.get(name), tally)
        if isinstance(calls, Fault):
            return calls
        if said and calls and not same_calls(said, calls):
            return Fault(TWICE, "the tool calls stand in two fields that differ")
        said = said or calls
    return said


def _flag(item: dict[str, Any]) -> bool | Fault:
    """Whether the message is to be supervised: not when any of its flags says no."""
    learn = True
    for name in () if _FLAGS.isdisjoint(item) else (*FLAGS, *MASKS):
        value = item.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            return Fault(WRONG_TYPE, f"`{name}` is {kind(value)}")
        learn = learn and bool(value) != (name in MASKS)
    return learn


def _masked(detail: Any, content: str) -> tuple[tuple[int, int], ...] | Fault:
    """The spans [start, end) of `content`, in characters, that `train_detail` says are masked."""
    if is_empty(detail):
        return ()
    spans = []
    for part in detail if type(detail) is list else [detail]:
        if type(part) is not dict:
            return Fault(WRONG_TYPE, "`train_detail` is no list of objects")
        first, last, train = part.get("begin_offset"), part.get("end_offset"), part.get("train")
        if type(first) is not int or type(last) is not int or train not in (False, True):
            return Fault(WRONG_TYPE, "`train_detail` has a span without begin_offset, end_offset and train")
        if not 0 <= first <= last < len(content):
            return Fault(WRONG_TYPE, f"`train_detail` names characters {first} to {last} of {len(content)}")
        if not train:
            spans.append((first, last + 1))
    return tuple(sorted(spans))


def _covers(spans: Sequence[tuple[int, int]], content: str) -> bool:
    """Whether the spans leave nothing of the text but white space."""
    at = 0
    for start, end in spans:
        if content[at:start].strip():
            return False
        at = max(at, end)
    return bool(spans) and not content[at:].strip()


def system_message(record: dict[str, Any], messages: Sequence[Message], tally: FieldTally) -> list[Message] | Fault:
    """What a record's own `system` puts before its messages: nothing where it is empty or where they begin with it."""
    name, twice = one_of(record, SYSTEMS)
    if twice:
        return Fault(TWICE, "the system message stands in two fields that differ", len(messages))
    if name is None:
        return []
    text = content_text(record[name], tally)
    if not isinstance(text, str):
        return text or Fault(WRONG_TYPE, f"`{name}` is {kind(record[name])}", len(messages))
    if not text or text.isspace():
        return []
    if messages and messages[0].role == "system":
        if messages[0].content.strip() == text.strip():
            return []
        return Fault(TWICE, f"`{name}` and a system message differ", len(messages))
    return [Message("system", text)]
