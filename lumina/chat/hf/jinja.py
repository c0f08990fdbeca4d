"""A Hugging Face chat template: turns -> text, by Jinja in its sandbox.

What a template may use is what transformers offers it: `messages`, `tools`, `add_generation_prompt`, the tokenizer's
special tokens by name, `raise_exception`, `tojson`, loop controls, {% generation %} blocks and `strftime_now`. The last
gives the date that the tokenizer's folder records and not today's: what a conversation is trained on must not depend
on the day. `enable_thinking` (and `thinking`, as some call it) is defined where an answer with or without reasoning is
asked for.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, NoReturn

from lumina.config import UserError, install_command

if TYPE_CHECKING:
    from jinja2 import Environment

_REASON_LENGTH = 100  # of a template's complaint: reasons are counted, and a table has room for that much


class RefusalError(Exception):
    """A conversation that the template does not take, or that cannot be masked; the text says why."""


@functools.cache
def _environment() -> Environment:
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("an imported model's chat template needs jinja2", install_command("hf")) from None

    class Generation(Extension):
        """{% generation %} marks an answer for other trainers: what is inside is written as it is."""

        tags = {"generation"}  # noqa: RUF012 - as its base class declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **form: Any) -> str:
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **form)
        if ensure_ascii:  # the characters that escape special tokens are taken out later, so they stay what they are
            text = re.sub(r"\\u(fd[de][0-9a-f])", lambda found: chr(int(found[1], 16)), text)
        return text

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


class JinjaTemplate:
    """A compiled template and the names that it may use."""

    def __init__(self, text: str, names: Mapping[str, str], where: str, day: date | None = None) -> None:
        """`names`: bos_token, eos_token and their like; `where` is named in errors; `day`: the date that
        `strftime_now` gives, which is not defined without one. Raises UserError."""
        self._names: dict[str, Any] = {"tools": None, "documents": None, **names}
        if day is not None:
            self._names["strftime_now"] = day.strftime
        environment = _environment()
        try:
            self._template = environment.from_string(text)
        except Exception as error:  # a template can fail to compile in many ways, recursion among them
            raise UserError(f"{where}: the chat template cannot be read: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        opening: bool,
        tools: Sequence[Any] | None = None,
        thinking: bool | None = None,
    ) -> str:
        """The text of these messages; with `opening`, also that which begins an assistant's message. Raises
        RefusalError."""
        given = self._names if not tools else {**self._names, "tools": tools}
        if thinking is not None:
            given = {**given, "enable_thinking": thinking, "thinking": thinking}
        try:
            return self._template.render(messages=messages, add_generation_prompt=opening, **given)
        except Exception as error:  # raise_exception() for an order of roles, or whatever its expressions ran into
            why = " ".join(str(error).split())[:_REASON_LENGTH] or type(error).__name__
            raise RefusalError(f"the chat template refuses it: {why}") from None
