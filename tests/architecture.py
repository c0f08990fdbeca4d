"""The plan of the house, and what in a tree of sources does not keep to it.

ROOMS says which room may import from which. A room's door is its `__init__`; what that lists in `__all__` is handed
out, and a module or sub-room among it is a door too. Every import statement counts, also one under TYPE_CHECKING or
inside a function, and so does `import_module` of a literal name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

#: Room -> the rooms that it may import from, from the lowest up.
ROOMS: dict[str, tuple[str, ...]] = {
    "lumina.kernels": (),  # only torch and triton
    "lumina.config": (),
    "lumina.chat": ("lumina.config",),
}
_LOW = tuple(room for room in ROOMS if room != "lumina.kernels")
ROOMS["lumina.model"] = ("lumina.kernels", *_LOW)
ROOMS["lumina.checkpoint"] = ("lumina.model", *_LOW)  # to merge adapters into weights
ROOMS["lumina.data"] = ROOMS["lumina.monitor"] = _LOW
_BASE = ("lumina.data", "lumina.model", "lumina.checkpoint", "lumina.monitor", *_LOW)
ROOMS["lumina.plan"] = _BASE
ROOMS["lumina.cluster"] = ("lumina.plan", *_BASE)  # each node checks its environment
ROOMS["lumina.train"] = ROOMS["lumina.infer"] = ("lumina.cluster", "lumina.plan", *_BASE)
_ALL = ("lumina.train", "lumina.infer", "lumina.cluster", "lumina.plan", *_BASE)
ROOMS["lumina.commands"] = (*_ALL, "lumina.kernels")
ROOMS["lumina.cli"] = ("lumina.commands", *_ALL)
ROOMS["lumina.__main__"] = ROOMS["launchers"] = ("lumina.cli",)
ROOMS["lumina.api"] = _ALL  # what Python programs call; lumina/__init__.py hands it out
ROOMS["lumina"] = ("lumina.api", *_ALL)

#: What every room may use, because it imports nothing of the package.
GROUND = ("lumina.files", "lumina.lazy", "lumina.processes", "lumina.terminal", "lumina.__version__")

#: Benchmarks stand beside what they time and know every room; no module but themselves imports them.
BENCHMARKS = ("lumina.kernels.bench", "lumina.kernels.model_step", "lumina.kernels.output_layer")

#: What prints by itself: the printer, kernels (which know no room), launchers, a protocol of JSON on stdout, and a
#: program that imports nothing of the package and prints a number.
PRINTS = (
    *("lumina.terminal", "lumina.kernels", "launchers", "lumina.cluster.preflight.probe"),
    "lumina.train.liveness.lock_watch",
)

MOST_FILES = 16  # of a folder, its `__init__` included
MOST_LINES = 400  # of a file
#: Where the bounds do not hold: folders with one file a health rule, and one an operator beside what measures them.
LARGE = ("lumina/train/health/rules", "kernels")


class Import(NamedTuple):
    module: str  # that imports
    target: str  # the module that is imported, or of which a name is
    line: int


@dataclass
class Tree:
    """Sources by their path relative to the root; kernels/ counts as lumina/kernels, as which it is installed."""

    sources: dict[str, str]
    _names: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self._names = {_module(path): path for path in self.sources}

    @classmethod
    def read(cls, root: Path) -> Tree:
        paths = [path for folder in ("lumina", "kernels", "launchers") for path in (root / folder).rglob("*.py")]
        return cls({path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)})

    @cached_property
    def imports(self) -> list[Import]:
        """Of the tree's modules from one another, in order."""
        found = []
        for module, path in self._names.items():
            package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
            for name, line in _imported(self._trees[module], package):
                target = self._target(name)
                if target not in (None, module, *GROUND) and module not in BENCHMARKS:
                    assert target is not None
                    found.append(Import(module, target, line))
        return found

    def _target(self, name: str) -> str | None:
        """The module that `name` is, or of which it is an attribute; None if it is not of this tree."""
        if name in GROUND or name in self._names:
            return name
        parent = name.rpartition(".")[0]
        return parent if parent in self._names else None

    @cached_property
    def _exported(self) -> dict[str, Collection[str]]:
        """The names in each module's `__all__`."""
        return {module: set(_all_of(tree)) for module, tree in self._trees.items()}

    @cached_property
    def _trees(self) -> dict[str, ast.Module]:
        return {module: _parse(self.sources[path]) for module, path in self._names.items()}

    def place(self, one: Import) -> str:
        return f"{self._names[one.module]}:{one.line}"

    # --- Findings, each a line of text ---

    def upward(self) -> list[str]:
        """Imports that no arrow of ROOMS allows."""
        found = []
        for one in self.imports:
            own, other = room_of(one.module), room_of(one.target)
            if other != own and (other not in ROOMS.get(own, ()) or one.target in BENCHMARKS):
                found.append(f"{self.place(one)}: {own} must not import {one.target}")
        return found

    def past_doors(self) -> list[str]:
        """Imports from inside another room."""
        found = []
        for one in self.imports:
            other = room_of(one.target)
            if other != room_of(one.module) and not self._is_door(one.target, other):
                found.append(f"{self.place(one)}: {one.target} is inside {other}: import from its door")
        return found

    def _is_door(self, module: str, room: str) -> bool:
        while module != room:
            parent, _, name = module.rpartition(".")
            if name not in self._exported[parent]:
                return False
            module = parent
        return True

    def circles(self) -> list[str]:
        """Modules that import one another, each circle once."""
        edges: dict[str, set[str]] = {}
        for one in self.imports:
            edges.setdefault(one.module, set()).add(one.target)
        return [" -> ".join(_circle(found, edges)) for found in _knots(edges)]

    def too_large(self) -> list[str]:
        """Folders of many files, and long files."""
        folders: dict[str, int] = {}
        found = []
        for path, source in self.sources.items():
            folder = path.rpartition("/")[0]
            folders[folder] = folders.get(folder, 0) + 1
            if (lines := source.count("\n")) > MOST_LINES and path not in LARGE:
                found.append(f"{path}: {lines} lines, at most {MOST_LINES}")
        many = {folder: count for folder, count in folders.items() if count > MOST_FILES and folder not in LARGE}
        return found + [f"{folder}: {count} files, at most {MOST_FILES}" for folder, count in many.items()]

    def locale_text(self) -> list[str]:
        """Text files that are read or written in the locale's encoding: no `encoding=` is given."""
        found = []
        for module, tree in self._trees.items():
            for node in _nodes(tree):
                named = isinstance(node, ast.Call) and any(keyword.arg == "encoding" for keyword in node.keywords)
                if isinstance(node, ast.Call) and _is_text_file(node) and not named:
                    found.append(f"{self._names[module]}:{node.lineno}: a text file without encoding=")
        return found

    def raw_prints(self) -> list[str]:
        """Prints past lumina.terminal, which shows what could steer a terminal: print, and rich's own console."""
        found = []
        for module, tree in self._trees.items():
            if room_of(module) in PRINTS or module in PRINTS:
                continue
            consoles = set(_names_from(tree, "rich.console", "Console"))
            for node in _nodes(tree):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"print", *consoles}:
                    found.append(f"{self._names[module]}:{node.lineno}: print with lumina.terminal")
        return found

    def findings(self) -> list[str]:
        own = (
            self.upward(),
            self.past_doors(),
            self.circles(),
            self.too_large(),
            self.locale_text(),
            self.raw_prints(),
        )
        return [line for lines in own for line in lines]


def room_of(module: str) -> str:
    """lumina.data.loading.order -> lumina.data; launchers.train -> launchers."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "lumina" else parts[0]


def _is_text_file(call: ast.Call) -> bool:
    """Path.read_text and write_text, and open in a mode without b; lumina.files' functions are called by their names,
    or as `files.NAME`."""
    if isinstance(call.func, ast.Attribute):
        name, owner = call.func.attr, getattr(call.func.value, "id", "")
    else:
        name, owner = getattr(call.func, "id", ""), None
    if name in ("read_text", "write_text"):
        return owner not in (None, "files")
    if name not in ("open", "fdopen"):
        return False
    given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    modes = [
        str(one.value) for one in given if isinstance(one, ast.Constant) and re.fullmatch("[rwaxbt+]+", str(one.value))
    ]
    if modes:
        return "b" not in modes[-1]
    return (owner is None and bool(call.args)) or (name == "open" and not call.args)


def _names_from(tree: ast.Module, module: str, name: str) -> Iterator[str]:
    """What a name of `module` is called in a module that imports it."""
    for node in _nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.module == module:
            yield from (alias.asname or alias.name for alias in node.names if alias.name == name)


@cache
def _parse(source: str) -> ast.Module:
    return ast.parse(source)


@cache  # walking takes longer than looking, and most trees that are compared differ in one file
def _nodes(tree: ast.AST) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree))


def _module(path: str) -> str:
    path = f"lumina/{path}" if path.startswith("kernels/") else path
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _all_of(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


def _imported(tree: ast.Module, package: str) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of all that a module imports: `from a import b` gives a.b."""
    for node in _nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*above, *filter(None, [node.module])])
            yield from ((f"{start}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value), node.lineno


def _knots(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """Sets of more than one module, each of which reaches every other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            knot = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(knot) > 1:
                found.append(knot)

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def _circle(knot: set[str], edges: Mapping[str, set[str]]) -> list[str]:
    """A shortest way from a module of the knot back to it."""
    start = min(knot)
    ways = [[start]]
    while True:
        longer = []
        for way in ways:
            for other in sorted(edges[way[-1]] & knot):
                if other == start:
                    return [*way, start]
                if other not in way:
                    longer.append([*way, other])
        ways = longer
