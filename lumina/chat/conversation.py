"""Conversations, the roles of their messages, and the one rule of what is supervised.

The rule: supervised (part of the loss) are the assistant's messages and plain texts, each from the first token that the
model is to say (of its reasoning, its content or its tool calls) to the token that ends it; a record may set a message
aside as context (`supervise`) or spans of it (`masked`). Tools and their results are context. Tokenizers say where
contents begin and end; `loss_mask` says which tokens count.

Shapes: T tokens, M messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ROLE_ALIASES = {
    "user": "user",
    "prompter": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
}
TOOL_ROLE = "tool"  # a message that is a tool's result
TEXT_ROLE = "text"
ROLES = ("user", "assistant", "system", TOOL_ROLE, TEXT_ROLE)
SUPERVISED_ROLES = ("assistant", TEXT_ROLE)
SUPERVISION_VERSION = ""  # part of every data fingerprint: change it with the rule, or earlier caches are still used


class ToolCall(NamedTuple):
    """A call of a tool. `arguments` is the JSON text of an object, as the model is to write it; `id` ties the result to
    the call and is not rendered by every template."""

    name: str
    arguments: str
    id: str = ""


class Message(NamedTuple):
    """One message. `role` is one of ROLES; `supervise` False makes an assistant's message context, as `masked` does
    with spans [start, end) of the characters of its content.

    An assistant says its reasoning, then its content, then its tool calls; each may be empty. `name` and `call_id` are
    a tool result's: the tool that was called, and the id of the call.
    """

    role: str
    content: str
    supervise: bool = True
    masked: tuple[tuple[int, int], ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    call_id: str = ""


class MessageColumns(NamedTuple):
    """The fields of M messages, a tuple of M each: in Python, a loop over many messages costs as much as all else."""

    role: tuple[str, ...]
    content: tuple[str, ...]
    supervise: tuple[bool, ...]
    masked: tuple[tuple[tuple[int, int], ...], ...]
    reasoning: tuple[str, ...]
    tool_calls: tuple[tuple[ToolCall, ...], ...]
    name: tuple[str, ...]
    call_id: tuple[str, ...]

    @property
    def content_alone(self) -> bool:
        """Whether content is all that any of the messages says."""
        return not (any(self.reasoning) or any(self.tool_calls))


def message_columns(messages: Sequence[Message]) -> MessageColumns:
    """The messages' fields, each of them together."""
    none: tuple[tuple[Any, ...], ...] = ((),) * len(Message._fields)
    return MessageColumns(*(zip(*messages, strict=True) if messages else none))


@dataclass(slots=True)
class Conversation:
    """Messages in order; `id` groups what must stay on one side of a split, `origin` says where it was read. `tools`:
    JSON texts, one for each tool that the assistant may call, as OpenAI's API has them: `{"type": "function",
    "function": {"name", "description"?, "parameters"?}}`."""

    messages: Sequence[Message]
    id: str = ""
    origin: str = ""
    tools: tuple[str, ...] = ()


def full_text(message: Message) -> str:
    """All that a message says: reasoning, content and tool calls. Of a message with nothing but content, that alone."""
    if not message.reasoning and not message.tool_calls:
        return message.content
    calls = (f"{call.name} {call.arguments}" for call in message.tool_calls)
    return "\n".join(text for text in (message.reasoning, message.content, *calls) if text)


def full_texts(messages: Sequence[Message], columns: MessageColumns) -> Sequence[str]:
    """`full_text` of each of these messages, whose fields `columns` are."""
    return columns.content if columns.content_alone else list(map(full_text, messages))


def is_supervised(message: Message) -> bool:
    """Whether any token of the message is part of the loss."""
    return message.supervise and message.role in SUPERVISED_ROLES


def are_supervised(role_M: NDArray[np.int64], supervise: Sequence[bool]) -> NDArray[np.bool_]:
    """`is_supervised` of many messages (M) at once, from their roles, as indices into ROLES, and their flags."""
    by_role = np.array([role in SUPERVISED_ROLES for role in ROLES])
    flags_M: NDArray[np.bool_] = by_role[role_M] & np.fromiter(supervise, dtype=np.bool_, count=len(role_M))
    return flags_M


def loss_mask(
    supervised_M: NDArray[np.bool_], starts_M: NDArray[np.int64], ends_M: NDArray[np.int64], tokens: int
) -> NDArray[np.uint8]:
    """mask_T (uint8, T = tokens): 1 on the supervised messages' tokens [start, end), which begin with the content and
    end with the token that ends the message."""
    change_T = np.zeros(tokens + 1, dtype=np.int8)
    change_T[starts_M[supervised_M]] += 1
    change_T[ends_M[supervised_M]] -= 1
    return np.cumsum(change_T[:-1], dtype=np.int8).view(np.uint8)
