"""Extension points: the named things that a setting can choose among, ours and those of other installed packages.

One file is one thing. A registry's own things are the files of one folder (those that begin with an underscore are
helpers), each with one object under the registry's attribute; other packages add theirs by an entry point:

    [project.entry-points."lumina.schedules"]
    staircase = "my_package.staircase:SCHEDULE"

Names are listed without importing anything, so that reading a configuration or printing a help text stays quick; a
thing's module is imported when it is chosen.
"""

from __future__ import annotations

import ast
import difflib
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from lumina.config.errors import UserError

_ROOT = Path(__file__).parent.parent


class Registry:
    """The things of one kind, by name.

    kind: what the thing is called in messages ("schedule"). group: the entry points' group. folder: where ours are,
    relative to the package (`train/schedules`). attribute: the object that each file defines. A file `one_cycle.py` is
    named `one_cycle`, or `one-cycle` where `separator` is "-".
    """

    def __init__(self, kind: str, group: str, folder: str, attribute: str, separator: str = "_") -> None:
        self.kind, self.group, self.attribute = kind, group, attribute
        self._folder = folder
        self._separator = separator

    def own(self) -> dict[str, Path]:
        """Our own: name -> file, sorted by name."""
        return _own(self._folder, self._separator)

    def added(self) -> dict[str, EntryPoint]:
        """Those of other installed packages. Raises UserError where two have one name."""
        return _added(self)

    def names(self) -> list[str]:
        return [*self.own(), *self.added()]

    def check(self, name: str) -> str:
        """`name`, if there is such a thing. Raises ValueError with a did-you-mean otherwise (pydantic reports it)."""
        if name in self.own() or name in self.added():
            return name
        near = difflib.get_close_matches(name, self.names(), n=1, cutoff=0.6)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"no such {self.kind}: {name}.{hint} There are: {', '.join(self.names())}.")

    def get(self, name: str) -> Any:
        """The object called `name`, its module imported. Raises ValueError where there is none, UserError where another
        package's does not load."""
        if name in self.own():
            dotted = f"lumina.{self._folder.replace('/', '.')}.{name.replace(self._separator, '_')}"
            return getattr(import_module(dotted), self.attribute)
        self.check(name)
        point = self.added()[name]
        try:
            return point.load()
        except Exception as error:
            raise UserError(
                f"the {self.kind} {name} ({point.value}, of {_package(point)}) does not load: "
                f"{type(error).__name__}: {error}",
                f"Install {_package(point)} anew, or choose another {self.kind}.",
            ) from error

    def summary(self, name: str) -> str:
        """The first line of the thing's file, for help texts and documents; of another package, its name."""
        if name in self.own():
            return (ast.get_docstring(ast.parse(self.own()[name].read_text(encoding="utf-8"))) or "").partition("\n")[0]
        return f"of {_package(self.added()[name])}"


def forget() -> None:
    """Drop the cache of installed packages: one was installed, or put on the path, after the first look."""
    _added.cache_clear()


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module


@cache
def _own(folder: str, separator: str) -> dict[str, Path]:
    files = sorted((_ROOT / folder).glob("*.py"))
    return {file.stem.replace("_", separator): file for file in files if not file.stem.startswith("_")}


@cache
def _added(registry: Registry) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=registry.group):
        taken = found.get(point.name)
        if taken is not None and taken.value == point.value:  # one package, found by two of its metadata folders
            continue
        if taken is not None or point.name in registry.own():
            by = "lumina" if taken is None else _package(taken)
            raise UserError(
                f"two packages have a {registry.kind} called {point.name}: {by} and {_package(point)}",
                f"Uninstall {_package(point)}, or rename its entry point.",
            )
        found[point.name] = point
    return dict(sorted(found.items()))


FORMATS = Registry("data format", "lumina.formats", "data/formats", "FORMAT")
FAMILIES = Registry("model family", "lumina.families", "model/families", "FAMILY")
SCHEDULES = Registry("schedule", "lumina.schedules", "train/schedules", "SCHEDULE")
OBJECTIVES = Registry("objective", "lumina.objectives", "train/objectives", "OBJECTIVE")
HEALTH_RULES = Registry("health rule", "lumina.health_rules", "train/health/rules", "RULE", separator="-")
TRACKERS = Registry("tracker", "lumina.trackers", "monitor/trackers", "TRACKER")
TRANSPORTS = Registry("transport", "lumina.transports", "cluster/transports", "TRANSPORT")
