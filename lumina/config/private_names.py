"""Names of other packages that are no part of their documented interface: declared, and checked before they are used.

A name that was renamed or that takes other arguments ends the start with its own name and the versions that were tried.
Looked up where it is used, it would fail in the middle of a run, or (behind a `hasattr`) do nothing without a word.
"""

from __future__ import annotations

import dis
import importlib
import importlib.metadata
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType, ModuleType
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
        if here is _MISSING and not _assigns(owner, self.name):
            return f"{self.owner} has no {self.name} ({self.why})"
        if self.parameters is not None:
            found = _parameters(inspect.unwrap(getattr(owner, self.name)))
            if inspect.isclass(owner) and not isinstance(here, staticmethod | classmethod):
                found = found[1:]
            names = tuple(one.name for one in found)
            optional = all(
                one.default is not one.empty or one.kind in _VARIADIC for one in found[len(self.parameters) :]
            )
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
        raise UserError(
            f"{package} {importlib.metadata.version(package)} lacks what Lumina uses of its private names: "
            + "; ".join(problems),
            tried(package),
        )


def tried(package: str) -> str:
    """The remedy: which versions were tried, and how to have one."""
    return f"Install a version that was tried: pip install '{package}{bounds(package)}'; docs/install.md lists them."


def _resolve(owner: str) -> Any:
    module, _, name = owner.partition(":")
    found: Any = importlib.import_module(module)
    for part in filter(None, name.split(".")):
        found = getattr(found, part)
    return found


def _assigns(owner: Any, name: str) -> bool:
    """Whether a method of a class, an inherited one too, or a function assigns to an attribute `name` of any object."""
    return any(
        one.opname == "STORE_ATTR" and one.argval == name
        for code in _codes(owner)
        if name in code.co_names
        for one in dis.get_instructions(code)
    )


@cache
def _codes(owner: Any) -> list[CodeType]:
    if isinstance(owner, ModuleType):
        return []
    values = [value for cls in owner.__mro__ for value in vars(cls).values()] if inspect.isclass(owner) else [owner]
    found = [function.__code__ for value in values for function in functions_in(value)]
    for code in found:  # and those nested in it
        found.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
    return found


def functions_in(value: Any) -> list[FunctionType]:
    """The function that `value` is, and those that its decorators hide, said (`__wrapped__`) or not (a closure)."""
    found: list[FunctionType] = []
    waiting, seen = [value], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [inner for name in ("__func__", "__wrapped__") if (inner := getattr(one, name, None)) is not None]
        if isinstance(one, FunctionType):
            found.append(one)
            waiting += [value for value in inspect.getclosurevars(one).nonlocals.values() if callable(value)]
    return found


def _parameters(function: Any) -> list[inspect.Parameter]:
    """Those of a function, under decorators that only pass on what they are given."""
    found: list[inspect.Parameter] = []
    for one in (function, *functions_in(function)):
        found = list(inspect.signature(one).parameters.values())
        if not found or any(parameter.kind not in _VARIADIC for parameter in found):
            break
    return found
