"""Base of the request schemas: which fields are used, which have no effect here, and which are refused.

A field that is null, or has a value with which it changes nothing, is left out and named once in the log. Any other
field that the schema does not have is refused by name: the answer would not be what the client asked for.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

log = logging.getLogger("lumina")

LONGEST = 4096  # entries of a list; `longest` has those that may have more or fewer
ANY: Any = object()
"""In a table of fields without effect: whatever the value."""
_MOST_NAMES, _NAME_LENGTH = 200, 64  # names come from clients: the log takes so many, so long

_logged: set[str] = set()


class StrictModel(BaseModel):
    """`no_effect`: fields without effect, and the values with which they have none. `refused`: why some other field
    that clients send cannot be met. `longest`: entries of a list, where not LONGEST."""

    model_config = ConfigDict(extra="forbid")
    no_effect: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    refused: ClassVar[Mapping[str, str]] = {}
    longest: ClassVar[Mapping[str, int]] = {}

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if value is None or _harmless(cls.no_effect.get(name, ()), value):
                if name not in cls.model_fields:
                    _note(name)
            elif name in cls.refused and name not in cls.model_fields:
                raise PydanticCustomError("refused", "{why}", {"field": name, "why": cls.refused[name]})
            elif name not in cls.known():
                why = "is not a field that this server knows"
                raise PydanticCustomError("refused", "{why}", {"field": name, "why": why})
            elif isinstance(value, list) and len(value) > (most := cls.longest.get(name, LONGEST)):
                why = f"has {len(value)} entries, more than {most}"
                raise PydanticCustomError("refused", "{why}", {"field": name, "why": why})
            else:
                kept[name] = value
        return kept

    @classmethod
    @functools.cache
    def known(cls) -> frozenset[str]:
        """The fields as clients spell them."""
        return frozenset(field.alias or name for name, field in cls.model_fields.items())


def _harmless(values: tuple[Any, ...], value: Any) -> bool:
    return any(known is ANY or (type(known) is type(value) and known == value) for known in values)


def _note(name: str) -> None:
    shown = ascii(name[:_NAME_LENGTH])
    if shown not in _logged and len(_logged) < _MOST_NAMES:
        _logged.add(shown)
        log.info("requests have a field %s, which has no effect here", shown)
