"""The messages of a chat request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import FailFast, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lumina.chat import Conversation, Message
from lumina.infer.serve.errors import ApiError
from lumina.infer.serve.requests.strict import ANY, StrictModel
from lumina.infer.serve.requests.tools import TOOLS, CalledFunction, CallPart

_ROLES = {"developer": "system", "function": "tool"}
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # parts, and their field


class ChatMessage(StrictModel):
    """A message as clients send it: also as they send back what they were answered, with its empty fields."""

    no_effect: ClassVar = {
        "id": (ANY,),
        "status": (ANY,),
        "created": (ANY,),
        "annotations": (ANY,),
        "provider_specific_fields": (ANY,),
        "response_metadata": (ANY,),
        "additional_kwargs": (ANY,),
        "cache_control": (ANY,),
        "thinking_blocks": ([],),
        "images": ([],),
        "finish_reason": (ANY,),
    }
    longest: ClassVar = {"tool_calls": TOOLS}
    refused: ClassVar = {"audio": "is not supported: this model takes text only"}

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | None = None
    name: str | None = None
    tool_calls: Annotated[list[CallPart], FailFast()] = Field([])
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    function_call: CalledFunction | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: Any) -> str:
        """Text, or parts of text."""
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise ValueError("takes a text or a list of parts")
        return "".join(_part(part) for part in value)

    @model_validator(mode="after")
    def _whole(self) -> ChatMessage:
        if self.content is None and self.role in ("system", "developer", "user"):
            context = {"field": "content", "why": f"a message of role {self.role} needs a text"}
            raise PydanticCustomError("refused", "{why}", context)
        return self

    def says(self) -> str:
        return self.content or self.refusal or ""


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise ValueError("a part needs a type")
    if kind not in _TEXTS:
        raise ValueError(f"a part of type {kind[:40]!r} is not supported: this model takes text only")
    text = part.get(_TEXTS[kind])
    if not isinstance(text, str):
        raise ValueError(f"a part of type {kind!r} needs its {_TEXTS[kind]}")
    return text


def conversation_of(messages: Sequence[ChatMessage], tools: Sequence[str]) -> Conversation:
    """The messages as Lumina has them. Raises ApiError: a result that answers no call, fields of another role."""
    found: list[Message] = []
    for message in messages:
        role = _ROLES.get(message.role, message.role)
        calls = [part.call() for part in message.tool_calls]
        if message.function_call is not None:
            calls.append(CallPart(function=message.function_call).call())
        reasoning = message.reasoning_content or message.reasoning or ""
        if role != "assistant" and (calls or reasoning):
            field = "tool_calls" if calls else "reasoning_content"
            raise _refusal(field, f"is the assistant's, and the message's role is {message.role}")
        if role == "tool":
            found.append(_result(message, found))
        else:
            found.append(Message(role, message.says(), reasoning=reasoning, tool_calls=tuple(calls)))
    return Conversation(found, tools=tuple(tools))


def _result(message: ChatMessage, before: Sequence[Message]) -> Message:
    """A tool's result, with the name of the tool that was called: of the call with its id, or of the next call that has
    no result yet where clients give none."""
    at = next((i for i in reversed(range(len(before))) if before[i].tool_calls), None)
    calls = [] if at is None else list(before[at].tool_calls)
    given = message.tool_call_id
    if given:
        call = next((c for m in reversed(before) for c in m.tool_calls if c.id == given), None)
        if call is None:
            raise _refusal("tool_call_id", f"no message before calls a tool with the id {given[:80]!r}")
    else:
        done = 0 if at is None else sum(m.role == "tool" for m in before[at + 1 :])
        waiting = [c for c in calls[done:] if message.name in (None, c.name)]
        if not waiting:
            raise _refusal("tool_call_id", "is missing, and no call before waits for a result")
        call = waiting[0]
    return Message("tool", message.says(), name=call.name, call_id=call.id)


def _refusal(field: str, why: str) -> ApiError:
    return ApiError(400, f"messages.{field}: {why}", param=f"messages.{field}")
