"""Tools in a request: their definitions, which of them is to be called, and the calls in an assistant's message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import Field, field_validator, model_validator

from lumina.chat import ToolCall, json_text
from lumina.infer.serve.errors import ApiError
from lumina.infer.serve.requests.strict import ANY, StrictModel

TOOLS, DEPTH = 128, 32  # tools in a request; objects and lists inside one another in a schema
GRAMMAR_BYTES = 1 << 16  # of schemas that a grammar is made of: it takes memory and time
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,64}$")]


def check_depth(value: Any, most: int = DEPTH) -> Any:
    """`value` when it is not nested deeper. Raises ValueError: parsers of schemas are recursive."""
    level, depth = [value], 0
    while level:
        level = [inner for outer in level for inner in _inside(outer)]
        depth += bool(level)
        if depth > most:
            raise ValueError(f"is nested more than {most} levels deep")
    return value


def _inside(value: Any) -> Sequence[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()


class FunctionDefinition(StrictModel):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False  # whether arguments are held to the schema

    @field_validator("parameters")
    @classmethod
    def _shallow(cls, value: Any) -> Any:
        return check_depth(value)


_SHOWN = ("name", "description", "parameters")


class Tool(StrictModel):
    no_effect: ClassVar = {"cache_control": (ANY,)}

    type: Literal["function"]
    function: FunctionDefinition
    text: str
    """As JSON, its keys in the client's order, as training keeps them; without those that are null or not the model's
    to know."""

    @model_validator(mode="before")
    @classmethod
    def _function(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "text" in data:
            raise ValueError('a tool is {"type": "function", "function": {"name", "description", "parameters"}}')
        if data.get("type") not in (None, "function"):
            raise ValueError(f"a tool of type {str(data['type'])[:40]!r} is not supported by this server: function is")
        function = data.get("function")
        given = function.items() if isinstance(function, dict) else ()
        used = {key: value for key, value in given if value is not None and key in _SHOWN}
        check_depth(used, DEPTH + 1)
        return {**data, "text": json_text({"type": "function", "function": used})}


class NamedTool(StrictModel):
    """A tool_choice that names a function."""

    type: Literal["function"]
    function: NamedFunction


class NamedFunction(StrictModel):
    name: str


def check_tools(tools: Sequence[Tool], choice: str | NamedTool) -> None:
    """Raise ApiError when a name stands twice, or the choice is none of them."""
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ApiError(400, f"tools: two of them are called {twice!r}", param="tools")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise ApiError(400, f"tool_choice: {choice.function.name[:80]!r} is none of the tools", param="tool_choice")
    size = sum(len(orjson.dumps(tool.function.parameters)) for tool in tools if tool.function.strict)
    if size > GRAMMAR_BYTES:
        text = f"tools: the schemas of strict functions are larger than {GRAMMAR_BYTES} bytes together"
        raise ApiError(400, text, param="tools")
    if choice == "required" and not names:
        raise ApiError(400, "tool_choice: required needs tools to choose from", param="tool_choice")


class CalledFunction(StrictModel):
    name: Name
    arguments: str = "{}"

    @field_validator("arguments", mode="before")
    @classmethod
    def _json(cls, value: Any) -> Any:
        """The JSON text of an object; some clients send the object, or nothing where there are no arguments."""
        if isinstance(value, dict):
            return json_text(check_depth(value))
        if not isinstance(value, str):
            raise ValueError("is not the JSON text of an object")
        if not value.strip():
            return "{}"
        try:
            found = orjson.loads(value)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError("is not the JSON text of an object")
        check_depth(found)
        return value


class CallPart(StrictModel):
    no_effect: ClassVar = {"index": (ANY,), "provider_specific_fields": (ANY,)}

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    def call(self) -> ToolCall:
        return ToolCall(self.function.name, self.function.arguments, self.id)
