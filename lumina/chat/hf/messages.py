"""Messages as a chat template gets them: dictionaries in the form of OpenAI's API, special tokens' names escaped.

Templates differ in what they expect of the same message, so there is a choice of forms (MessageForm); probing.py finds
the one in which a template renders everything that a message holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from lumina.chat.conversation import Conversation, Message
from lumina.chat.hf.escaping import EscapingEncoder, clean
from lumina.chat.hf.jinja import RefusalError

THINK, END_THINK = "<think>\n", "\n</think>\n\n"  # around reasoning, where a template has no field for it
_DEEPEST = 100  # levels of a JSON value; templates walk through them by recursion


class MessageForm(NamedTuple):
    """How an assistant's message is given to a template."""

    inline: bool = False  # reasoning at the beginning of the content, in THINK and END_THINK, instead of in its fields
    absent: bool = False  # None for an empty content beside tool calls
    text: bool = False  # the arguments of a call as JSON text instead of an object


#: In the order in which they are tried.
FORMS = tuple(MessageForm(*flags) for flags in product((False, True), repeat=3))


class EscapedCall(NamedTuple):
    id: str
    name: str
    arguments: dict[str, Any]
    text: str  # the arguments as JSON


class EscapedMessage(NamedTuple):
    """A message of which no text can become a special token."""

    role: str
    content: str
    reasoning: str
    calls: tuple[EscapedCall, ...]
    name: str
    call_id: str

    def to_dict(self, form: MessageForm) -> dict[str, Any]:
        """What the template gets. Keys of what the message does not have are left out: templates ask for them."""
        content: str | None = self.content
        if form.absent and self.calls and not content:
            content = None
        elif form.inline and self.reasoning:
            content = f"{THINK}{self.reasoning}{END_THINK}{content}"
        found: dict[str, Any] = {"role": self.role, "content": content}
        if self.reasoning and not form.inline:
            found |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), self.reasoning)
        if self.calls:
            found["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.text if form.text else call.arguments},
                }
                for call in self.calls
            ]
        if self.role == "tool":
            found |= {"name": self.name, "tool_call_id": self.call_id}
        return found


class EscapedConversation(NamedTuple):
    """The messages, the tools (parsed; None without any), and the character that escapes."""

    messages: list[EscapedMessage]
    tools: list[Any] | None
    character: str


def escape_conversation(
    conversation: Conversation, escaping: EscapingEncoder, nine: bool = False
) -> EscapedConversation:
    """`nine`: ids of calls are made up where one of them has not nine letters or digits.

    Raises RefusalError: a tool or the arguments of a call are not a JSON object, or no character is left to escape
    with."""
    given, tools = conversation.messages, [_parsed(text, "a tool") for text in conversation.tools]
    plain = not tools and not any(message.tool_calls or message.reasoning or message.name for message in given)
    if plain:
        contents = [clean(message.content) for message in given]
        character = escaping.choose_escape(contents)
        found = []
        for message, content in zip(given, contents, strict=True):
            own = escaping.escape(content, character, declared_only=message.role == "assistant")
            found.append(EscapedMessage(message.role, own, "", (), "", message.call_id))
        return EscapedConversation(found, None, character)
    arguments = [
        [_parsed(call.arguments, "the arguments of a call") for call in message.tool_calls] for message in given
    ]
    character = escaping.choose_escape(list(_texts(given, arguments, tools)))

    def escape(text: str, declared_only: bool = False) -> str:
        return escaping.escape(clean(text), character, declared_only)

    messages = [_escaped(message, parsed, escape) for message, parsed in zip(given, arguments, strict=True)]
    ids = [*(call.id for message in given for call in message.tool_calls), *(m.call_id for m in given)]
    fresh = nine and not all(len(own) == 9 and own.isalnum() for own in filter(None, ids))
    return EscapedConversation(_numbered(messages, fresh), _walk(tools, escape) or None, character)


def _escaped(message: Message, parsed: Sequence[dict[str, Any]], escape: Callable[..., str]) -> EscapedMessage:
    said = message.role == "assistant"  # what it says may hold names that the vocabulary declares to be text
    calls = []
    for call, own in zip(message.tool_calls, parsed, strict=True):
        arguments = _walk(own, lambda text: escape(text, said))
        calls.append(
            EscapedCall(call.id, escape(call.name, said), arguments, json.dumps(arguments, ensure_ascii=False))
        )
    texts = escape(message.content, said), escape(message.reasoning, said)
    return EscapedMessage(message.role, *texts, tuple(calls), escape(message.name), escape(message.call_id))


def _numbered(messages: list[EscapedMessage], fresh: bool) -> list[EscapedMessage]:
    """Calls and results with ids and names: where the data has none, results belong to calls in order. An id that is
    made up, with `fresh` each one, has nine digits, which every template takes."""
    found, calls, count, renamed = list[EscapedMessage](), list[EscapedCall](), 0, dict[str, str]()
    for message in messages:
        if message.calls:
            calls = []
            for call in message.calls:
                own_id = f"{count:09d}" if fresh or not call.id else call.id
                renamed[call.id] = own_id
                calls.append(call._replace(id=own_id))
                count += 1
            message = message._replace(calls=tuple(calls))
            calls = list(calls)
        elif message.role == "tool" and calls:
            if fresh:
                message = message._replace(call_id=renamed.get(message.call_id, "") if message.call_id else "")
            own = next((at for at, call in enumerate(calls) if message.call_id == call.id), None)
            if own is None and message.name:
                own = next((at for at, call in enumerate(calls) if message.name == call.name), None)
            call = calls.pop(own or 0)
            message = message._replace(call_id=message.call_id or call.id, name=message.name or call.name)
        found.append(message)
    return found


def _walk(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with all of its strings changed, keys among them."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_walk(one, change) for one in value]
    if isinstance(value, dict):
        return {change(key): _walk(one, change) for key, one in value.items()}
    return value


def leaves(value: Any) -> Iterator[str]:
    """The strings of a JSON value, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from leaves(one)
    elif isinstance(value, dict):
        for key, one in value.items():
            yield key
            yield from leaves(one)


def _texts(given: Sequence[Message], arguments: Sequence[Any], tools: list[Any]) -> Iterator[str]:
    for message in given:
        yield from (message.content, message.reasoning, message.name, message.call_id)
        yield from (call.name for call in message.tool_calls)
    yield from leaves([*arguments, tools])


@lru_cache(maxsize=4096)
def _parsed(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(clean(text))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RefusalError(f"{what} is not a JSON object")
    if _is_deep(value):
        raise RefusalError(f"{what} is nested more than {_DEEPEST} levels deep")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [one for outer in level for one in _inside(outer)]
    return bool(level)


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
