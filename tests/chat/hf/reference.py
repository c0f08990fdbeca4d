"""A reference for chat templates that renders by jinja2 alone: no line of Lumina's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import date
from functools import cache
from itertools import product
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

DAY = date(2026, 11, 28)


class _Generation(Extension):
    tags = {"generation"}  # noqa: RUF012 - as its base class declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise TemplateError(message)


@cache
def _compiled(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **form: json.dumps(
        value, ensure_ascii=ensure_ascii, **form
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = DAY.strftime
    return environment.from_string(template)


def rendered(template: str, names: dict[str, str], messages: Sequence[Any], tools: Any, **options: Any) -> str:
    """Raises jinja2's errors."""
    return str(_compiled(template).render(messages=list(messages), tools=tools or None, **names, **options))


def forms(message: Any) -> Iterator[dict[str, Any]]:
    """The dictionaries that a message may be given as, in the form of OpenAI's API."""
    calls, reasoning = message.tool_calls, message.reasoning
    for inline, empty, text in product((False, True) if reasoning else (False,), ("", None), (False, True)):
        if not calls and (text or empty is None):
            continue
        content = message.content or (empty if calls else "")
        if inline and content is not None:
            content = f"<think>\n{reasoning}\n</think>\n\n{content}"
        found: dict[str, Any] = {"role": message.role, "content": content}
        if reasoning and not inline:
            found |= {"reasoning_content": reasoning, "reasoning": reasoning, "thinking": reasoning}
        if calls:
            found["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": call.arguments if text else json.loads(call.arguments),
                    },
                }
                for call in calls
            ]
        if message.role == "tool":
            found |= {"name": message.name, "tool_call_id": message.call_id}
        yield found


def turns(
    template: str, names: dict[str, str], messages: Sequence[Any], tools: Sequence[str], at: int
) -> Iterator[tuple[str, str]]:
    """(prompt, whole) of the assistant's message number `at`, in every form and with every request for reasoning."""
    parsed = [json.loads(tool) for tool in tools]
    for given in product(*(list(forms(message)) for message in messages[: at + 1])):
        for thinking in ({}, *({"enable_thinking": on, "thinking": on} for on in (True, False))):
            options = {**thinking}
            try:
                prompt = rendered(template, names, given[:at], parsed, add_generation_prompt=True, **options)
                whole = rendered(template, names, given, parsed, add_generation_prompt=False, **options)
            except Exception:  # this form is not one that the template takes
                continue
            yield prompt, whole
