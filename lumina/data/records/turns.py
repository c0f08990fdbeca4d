"""Message objects -> messages: what every data format of conversations is turned into.

A message may carry a flag that says whether it is supervised (`weight`, as OpenAI's fine-tuning has it, `train`,
`training`, `trainable`, `loss`, `loss_mask` …), or `train_detail`, spans of its text that are not (axolotl's form, both
ends counted).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from lumina.chat import ROLE_ALIASES, Conversation, Message
from lumina.data.records.fault import EMPTY, NO_ASSISTANT, TWICE, UNKNOWN_ROLE, WRONG_TYPE, Fault, kind
from lumina.data.records.fields import FLAGS, HARMLESS, FieldTally, Vocabulary, is_empty, one_of

MESSAGE = Vocabulary(
    "a message", frozenset({"role", "from", "content", "value", "text", "refusal", "train_detail", *FLAGS})
)
EMPTY_SYSTEM, EMPTY_LAST = "empty system message", "empty last answer"

# Beside the aliases of lumina.chat. A tool's output is context for the assistant, as a user's words are.
ROLES = ROLE_ALIASES | {
    **dict.fromkeys(("gpt", "chatgpt", "model", "chatbot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "ipython"), "user"),
    "developer": "system",
}
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def decoded(value: Any) -> Any:
    """A list or an object kept as JSON in a text column; anything else as it is."""
    if type(value) is str and value.lstrip()[:1] in ("[", "{"):
        try:
            found = orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
        parts = found if type(found) is list else [found]
        # A text that happens to be JSON stays one: only what is made of turns is a conversation.
        turns = all(type(part) is list or (type(part) is dict and ("role" in part or "from" in part)) for part in parts)
        return found if turns else value
    return value


def to_conversation(
    record: dict[str, Any], messages: Sequence[Message], tally: FieldTally, vocabulary: Vocabulary
) -> Conversation | Fault:
    """The conversation of these messages after the record's own `system`, when every field of the record has a place
    and something is supervised."""
    if record.get("system") is not None:
        opening = system_message(record, messages)
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
    return Conversation(messages, group_id(record))


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
    plain = turns = 0
    for number, item in enumerate(raw, 1):
        if type(item) is dict and len(item) == 2:  # by far the most frequent
            role, content = item.get("role"), item.get("content")
            sharegpt = role is None and content is None
            if sharegpt:
                role, content = item.get("from"), item.get("value")
            known = ROLES.get(role) if type(role) is str else None
            if known is not None and type(content) is str and content and not content.isspace():
                messages.append(Message(known, content))
                if sharegpt:
                    turns += 1
                else:
                    plain += 1
                continue
        found = message_of(item, number, tally)
        if isinstance(found, Fault):
            if found.reason == EMPTY and number == len(raw) and _role(item) == "assistant":
                tally.left_out.append(EMPTY_LAST)
                continue
            return Fault(found.reason, f"message {number}: {found.detail}", len(raw))
        if found is not None:
            messages.append(found)
    tally.plain_messages += plain
    tally.plain_turns += turns
    return messages


def message_of(item: Any, number: int, tally: FieldTally) -> Message | Fault | None:
    """One message of any shape; None for an empty system message, which says nothing."""
    if type(item) is not dict:
        return Fault(WRONG_TYPE, f"it is {kind(item)}, not an object")
    known = _role(item)
    if isinstance(known, Fault):
        return known
    content = _content(item, known)
    if isinstance(content, Fault):
        return content
    learn = _flag(item)
    if isinstance(learn, Fault):
        return learn
    masked = _masked(item.get("train_detail"), content)
    if isinstance(masked, Fault):
        return masked
    if not content or content.isspace():
        if known == "system":
            tally.left_out.append(EMPTY_SYSTEM)
            return None
        fault = tally.count(MESSAGE, item)
        return fault if fault is not None else Fault(EMPTY, f"{known} message without content")
    message = Message(known, content, learn and not _covers(masked, content), masked)
    fault = tally.count(MESSAGE, item, [message])
    return message if fault is None else fault


def _role(item: dict[str, Any]) -> str | Fault:
    """A message's role, one of ours."""
    role = item["role"] if item.get("role") is not None else item.get("from")
    if None not in (item.get("role"), item.get("from")) and item["role"] != item["from"]:
        return Fault(TWICE, "`role` and `from` differ")
    if type(role) is not str:
        return Fault(WRONG_TYPE, f"`role` is {kind(role)}")
    known = ROLES.get(role.strip().lower())
    return known if known is not None else Fault(UNKNOWN_ROLE, f"role {role[:40]!r}")


def _content(item: dict[str, Any], role: str) -> str | Fault:
    """A message's text; a refusal is what an assistant says where it says nothing else."""
    name, twice = one_of(item, ("content", "value", "text", "refusal"))
    if twice:
        return Fault(TWICE, "its text stands in two fields that differ")
    content = item[name] if name is not None else None
    text = content_text(content)
    if isinstance(text, Fault):
        return text
    if text is None:
        if content is None and (
            role == "system" or any(not is_empty(item.get(key)) for key in ("tool_calls", "function_call"))
        ):
            return ""
        return Fault(WRONG_TYPE, f"`content` is {kind(content)}")
    return text


def content_text(content: Any) -> str | Fault | None:
    """A message's text: a string, or parts of type text joined; None for anything else, a Fault for parts that say
    something that is no text."""
    if type(content) is str:
        return content
    if type(content) is dict and content.get("type") in _TEXT_PARTS:
        content = [content]
    if type(content) is not list:
        return None
    texts = []
    for part in content:
        if type(part) is str:
            texts.append(part)
            continue
        sort = part.get("type", "text") if type(part) is dict else None
        where = _TEXT_PARTS.get(sort) if isinstance(sort, str) else None
        text = part.get(where) if where is not None else None
        if type(text) is str:
            for name, held in part.items():
                if name not in ("type", where) and name not in HARMLESS and not is_empty(held):
                    return Fault(f"field not used: {name[:30]}", f"`{name[:30]}` in a part of text has no place")
            texts.append(text)
        elif isinstance(sort, str) and sort not in _TEXT_PARTS:
            return Fault(f"field not used: content of type {sort[:30]}", f"a part of type {sort[:30]!r} has no place")
        else:
            return None
    return "".join(texts)


def _flag(item: dict[str, Any]) -> bool | Fault:
    """Whether the message is to be supervised: not when any of its flags says no."""
    learn = True
    for name in FLAGS:
        value = item.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            return Fault(WRONG_TYPE, f"`{name}` is {kind(value)}")
        learn = learn and bool(value)
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


def system_message(record: dict[str, Any], messages: Sequence[Message]) -> list[Message] | Fault:
    """What a record's own `system` puts before its messages: nothing where it is empty or where they begin with it."""
    system = record.get("system")
    if system is None:
        return []
    text = content_text(system)
    if not isinstance(text, str):
        return text or Fault(WRONG_TYPE, f"`system` is {kind(system)}", len(messages))
    if not text or text.isspace():
        return []
    if messages and messages[0].role == "system":
        if messages[0].content.strip() == text.strip():
            return []
        return Fault(TWICE, "`system` and a system message differ", len(messages))
    return [Message("system", text)]
