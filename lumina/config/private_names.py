"""Names of other packages that are no part of their documented interface: declared, and checked before they are used.

A name that was renamed or that takes other arguments ends the start with its own name and the versions that were tried.
Looked up where it is used, it would fail in the middle of a run, or (behind a `hasattr`) do nothing without a word.
"""

from __future__ import annotations

import dis
import importlib
import importlib.metadata
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

from lumina.config.errors import UserError
from lumina.config.versions import bounds

_MISSING = object()
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class PrivateName:
    """One name and what it is needed for.

    `owner`: "module", "module:Class" or "module:function". The name is an attribute of the module or class, or one that
    a method of the class, or the function, gives to an object (`self.name = ...`).
    `parameters`: of a function, those that it is given, in their order and without `self`; it may have more that have
    defaults. None where it is no function or is only replaced by ours.
    """

    owner: str
    name: str
    why: str
    parameters: tuple[str, ...] | None = None

    def problem(self) -> str | None:
        """What is wrong with it in the installed package, None if nothing is."""
        try:
            owner = _resolve(self.owner)
        except (ImportError, AttributeError):
            return f"{self.owner} ({self.name}: {self.why}) is not there"
        # Of classes and modules: what instances have besides is what their methods assign.
        here = inspect.getattr_static(owner, self.name, _MISSING)
        if here is _MISSING and self.name not in set(_assigned(owner)):
            return f"{self.owner} has no {self.name} ({self.why})"
        if self.parameters is not None:
            found = list(inspect.signature(getattr(owner, self.name)).parameters.values())
            found = found[1:] if inspect.isclass(owner) and not isinstance(here, staticmethod | classmethod) else found
            names = tuple(one.name for one in found)
            extra = found[len(self.parameters) :]
            optional = all(one.default is not one.empty or one.kind in _VARIADIC for one in extra)
            if names[: len(self.parameters)] != self.parameters or not optional:
                return f"{self.owner}.{self.name} takes ({', '.join(names)}), not {self.parameters} ({self.why})"
        return None


def require(package: str, names: Iterable[PrivateName]) -> None:
    """Check that the installed `package` has these names.

    Raises:
        UserError: lists those that it lacks, or that take other arguments.
    """
    problems = [problem for name in names if (problem := name.problem()) is not None]
    if problems:
        stated = bounds(package)
        raise UserError(
            f"{package} {importlib.metadata.version(package)} lacks what Lumina uses of its private names: "
            + "; ".join(problems),
            f"Install a version that was tried: pip install '{package}{stated}'; docs/install.md lists them.",
        )


def _resolve(owner: str) -> Any:
    module, _, name = owner.partition(":")
    found: Any = importlib.import_module(module)
    for part in filter(None, name.split(".")):
        found = getattr(found, part)
    return found


def _assigned(owner: Any) -> Iterator[str]:
    """The attributes that a class's methods, inherited ones too, or a function assign to any object."""
    if isinstance(owner, ModuleType):
        return
    functions = (value for cls in owner.__mro__ for value in vars(cls).values()) if inspect.isclass(owner) else (owner,)
    for function in functions:
        code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
        if code is not None:
            yield from _stored(code)


def _stored(code: CodeType) -> Iterator[str]:
    yield from (one.argval for one in dis.get_instructions(code) if one.opname == "STORE_ATTR")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _stored(constant)
