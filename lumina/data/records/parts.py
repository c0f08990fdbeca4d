"""A message's content: a text, or parts of text, reasoning, tool calls and tool results (OpenAI's, Anthropic's,
LangChain's and Mistral's)."""

from __future__ import annotations

from typing import Any

from lumina.chat import Message
from lumina.data.records.calls import calls_of, id_of, json_text
from lumina.data.records.fault import OUT_OF_ORDER, WRONG_TYPE, Fault, kind
from lumina.data.records.fields import NOT_USED, FieldTally, Vocabulary, is_empty, one_of

REASONING = (
    *("reasoning_content", "reasoning", "thinking", "thoughts", "thought", "think", "cot", "chain_of_thought"),
    *("rationale", "thinking_blocks", "reasoning_details"),
)
TEXT, THOUGHT, CALL, RESULT = "text", "reasoning", "tool call", "tool result"  # in the order of an assistant's message
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_TEXT_FIELDS = {name: Vocabulary("a part of text", frozenset({"type", name})) for name in ("text", "refusal")}
_REASONING_PARTS = (
    *("thinking", "reasoning", "thought", "reasoning_text", "summary_text", "reasoning.text", "reasoning.summary"),
    *("text", "input_text", "output_text"),
)
_REASONING_KEYS = ("thinking", "reasoning", "text", "content", "summary", "thought")
_REASONING_FIELDS = Vocabulary("a part of reasoning", frozenset({"type", *_REASONING_KEYS}))
_CALL_PARTS = ("tool_use", "tool_call")
_RESULT_FIELDS = Vocabulary("a tool's result", frozenset({"type", "content"}))
_NO_TEXT = frozenset({"image_url", "input_image", "input_audio", "input_file"})

Part = tuple[str, Any]  # TEXT and THOUGHT: str; CALL: ToolCall; RESULT: Message


def content_text(content: Any, tally: FieldTally) -> str | Fault | None:
    """A text that may be in parts, all of them of text; None for what is no content, a Fault for parts that say
    something else."""
    if type(content) is str:
        return content
    parts = content_parts(content, tally)
    if parts is None or isinstance(parts, Fault):
        return parts
    return only_text(parts)


def only_text(parts: list[Part]) -> str | Fault:
    """The text of parts where nothing else has a place."""
    other = next((sort for sort, _ in parts if sort != TEXT), None)
    if other is not None:
        return Fault(f"{NOT_USED}: content of type {other}", f"a part of type {other} has no place here")
    return "".join(text for _, text in parts)


def content_parts(content: Any, tally: FieldTally) -> list[Part] | Fault | None:
    """The parts of a content that is no plain text; None where it is none."""
    if type(content) is dict and isinstance(content.get("type"), str):
        content = [content]
    if type(content) is not list:
        return None
    found: list[Part] = []
    for part in content:
        if type(part) is str:
            found.append((TEXT, part))
            continue
        sort = part.get("type", "text") if type(part) is dict else None
        if not isinstance(sort, str):
            return None
        read = _part(part, sort, tally)
        if read is None or isinstance(read, Fault):
            return read
        found += read
    return found


def _part(part: dict[str, Any], sort: str, tally: FieldTally) -> list[Part] | Fault | None:
    """What one part says; None where it says nothing that is a text."""
    if sort in _TEXT_PARTS:
        where = _TEXT_PARTS[sort]
        text = part.get(where)
        if text is not None and type(text) is not str:
            return None
        fields = _TEXT_FIELDS[where]
        if not text:  # {"toolUse": …}: what it says stands under a key of its own
            other = [name for name, held in part.items() if fields.sort(name) == "unknown" and not is_empty(held)]
            if other:
                return Fault(f"{NOT_USED}: {other[0][:30]}", f"a part has no `{where}`, but `{other[0][:30]}`")
        return tally.count(fields, part) or [(TEXT, text or "")]
    if sort in _REASONING_PARTS:
        text = reasoning_text(part, f"content of type {sort}", tally)
        return text if isinstance(text, Fault) else [(THOUGHT, text)]
    if sort in _CALL_PARTS:
        calls = calls_of(part, tally)
        return calls if isinstance(calls, Fault) else [(CALL, call) for call in calls]
    if sort == "tool_result":
        fault = tally.count(_RESULT_FIELDS, part)
        text = result_text(part.get("content"), tally) if fault is None else fault
        return text if isinstance(text, Fault) else [(RESULT, result_message(part, text))]
    return Fault(f"{NOT_USED}: content of type {sort[:30]}", f"a part of type {sort[:30]!r} has no place")


def in_order(parts: list[Part]) -> Fault | None:
    """Why an assistant's parts cannot be rendered as they stand: reasoning comes first, then content, then calls."""
    order = (THOUGHT, TEXT, CALL)
    ranks = [order.index(sort) for sort, value in parts if sort in order and not (sort != CALL and is_empty(value))]
    if ranks == sorted(ranks):
        return None
    return Fault(OUT_OF_ORDER, " then ".join(order[rank] for rank in ranks)[:120])


def reasoning_text(value: Any, name: str, tally: FieldTally) -> str | Fault:
    """The words of a field of reasoning: a text, or parts of text or reasoning. Lists of texts are lines."""
    if type(value) is str:
        return value
    if type(value) is list:
        texts = []
        for part in value:
            text = "" if part is None else reasoning_text(part, name, tally)
            if isinstance(text, Fault):
                return text
            texts.append(text)
        return ("\n" if any(type(part) is str for part in value) else "").join(filter(None, texts))
    sort = value.get("type", "text") if type(value) is dict else None
    if type(value) is dict and sort in _REASONING_PARTS:
        where, twice = one_of(value, _REASONING_KEYS)
        if where is not None and not twice:
            return tally.count(_REASONING_FIELDS, value) or reasoning_text(value[where], name, tally)
    what = f"of type {sort[:30]!r}" if isinstance(sort, str) else kind(value)
    return Fault(f"{NOT_USED}: {name}", f"`{name}` is {what}, no text")


def result_text(content: Any, tally: FieldTally) -> str | Fault:
    """A tool's output as text: a text or its parts, JSON of anything else, nothing for null."""
    if content is None or type(content) is str:
        return content or ""
    parts = [content] if type(content) is dict else content if type(content) is list else []
    sorts = [part.get("type") if type(part) is dict else None for part in parts]
    for part, sort in zip(parts, sorts, strict=True):
        if isinstance(sort, str) and (sort in _NO_TEXT or (sort == "image" and "source" in part)):
            return Fault(f"{NOT_USED}: content of type {sort}", f"a tool's result of type {sort} has no place")
    if parts and all(isinstance(sort, str) and sort in _TEXT_PARTS for sort in sorts):
        text = content_text(parts, tally)
        if text is not None:
            return text
    found = json_text(content)
    return Fault(WRONG_TYPE, f"a tool's result is {kind(content)} without a form in JSON") if found is None else found


def result_message(held: dict[str, Any], text: str, supervise: bool = True) -> Message:
    """The message of a tool's result; its name and id are those of the call that it answers."""
    name = next((held[key] for key in ("name", "tool_name") if type(held.get(key)) is str), "")
    call_id = id_of(held, ("tool_call_id", "tool_use_id", "call_id"))
    return Message("tool", text, supervise, name=name, call_id=call_id)
