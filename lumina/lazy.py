"""Packages whose names are loaded on first use (PEP 562), so that importing a room's door costs nothing by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def names_of(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module `__getattr__` for `package`. homes: name -> its module, relative to the package ("loading.dataset").

    if TYPE_CHECKING:
        from lumina.data.loading.dataset import Batch
    __getattr__ = names_of(__name__, {"Batch": "loading.dataset"})
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return load
