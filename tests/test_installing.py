"""Install lines of documents and messages: each names our distribution, this clone, or what setup.py requires, never a
name of somebody else's on the package index."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import InvalidRequirement, Requirement

from lumina.config import DISTRIBUTION, install_command

ROOT = Path(__file__).parents[1]
SETUP = ast.parse((ROOT / "setup.py").read_text())
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("*.txt")]
SOURCES = [file for room in ("lumina", "kernels", "launchers", "benchmarks") for file in (ROOT / room).rglob("*.py")]
HISTORY = "CHANGELOG.md"  # says what earlier versions were called


def _assigned(name: str) -> ast.expr:
    return next(
        node.value
        for node in SETUP.body
        if isinstance(node, ast.Assign) and any(isinstance(one, ast.Name) and one.id == name for one in node.targets)
    )


EXTRAS: dict[str, list[str]] = ast.literal_eval(_assigned("EXTRAS_REQUIRE"))
REQUIRED = {
    Requirement(line).name
    for line in [*ast.literal_eval(_assigned("INSTALL_REQUIRES")), *(one for lines in EXTRAS.values() for one in lines)]
}


def _texts(file: Path) -> Iterator[str]:
    """The strings of a Python file, with `{}` for what an f-string fills in; or the whole of another file."""
    if file.suffix == ".ipynb":
        yield from ("".join(cell["source"]) for cell in json.loads(file.read_text())["cells"])
    if file.suffix != ".py":
        yield file.read_text()
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _install_lines() -> list[tuple[str, list[str]]]:
    """(file, words after `pip install`) of each; the words end where the command does."""
    found = []
    for file in [*DOCUMENTS, *SOURCES, *ROOT.glob("examples/*.ipynb")]:
        if file.name == HISTORY:
            continue
        for text in _texts(file):
            for rest in re.findall(r"pip install((?: +(?:'[^'\n]*'|[^\s`'\"(),;:|]+))+)", text):
                found.append((str(file.relative_to(ROOT)), shlex.split(rest, comments=True)))
    return found


def _fault(words: list[str]) -> str | None:
    """What is wrong with the words of one command, None if nothing is."""
    takes_value = {"-c", "-r", "--target", "--report"}
    at = iter(words)
    named = 0
    for word in at:
        if word in takes_value:
            next(at)
        elif word in ("or", "there", "in", "that"):  # prose goes on
            break
        elif word.startswith("."):
            named += 1
            path, _, extras = word.rstrip(".").partition("[") if word != "." else (word, "", "")
            if not (ROOT / path).exists():
                return f"no such folder: {path}"
            if unknown := set(filter(None, extras.rstrip("]").split(","))) - set(EXTRAS):
                return f"no such extra: {unknown}"
        elif not word.startswith("-") and "{}" not in word:
            named += 1
            try:
                requirement = Requirement(word)
            except InvalidRequirement:
                return f"no requirement: {word}"
            if requirement.name == DISTRIBUTION:
                if requirement.extras - set(EXTRAS):
                    return f"no such extra: {requirement.extras}"
            elif requirement.name not in REQUIRED:
                return f"setup.py does not name {requirement.name}"
    return None


def test_every_install_line_names_ours_or_what_setup_py_requires() -> None:
    lines = _install_lines()
    assert len(lines) > 15, "the README alone has several"
    assert {file for file, _ in lines} >= {"README.md", "docs/serve.md", "kernels/__init__.py"}
    assert [(file, words, fault) for file, words in lines if (fault := _fault(words))] == []


@pytest.mark.parametrize("line", ["'lumina[serve]'", "-e '.[sreve]'", "lumina", "./example", "no-such-thing"])
def test_a_wrong_line_is_found(line: str) -> None:
    assert _fault(shlex.split(line)) is not None


def test_every_message_asks_for_an_extra_that_is_there() -> None:
    asked = {
        node.args[0].value
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "install_command"
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    assert {"hf", "tracking", "mpi"} <= asked
    assert asked <= set(EXTRAS)


def test_the_command_works_from_any_folder(tmp_path: Path) -> None:
    """pip itself reads it: the clone, by its absolute path, with the extra and the name that setup.py gives."""
    words = shlex.split(install_command("serve"))
    assert words == ["pip", "install", "-e", f"{ROOT}[serve]"]
    name = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    assert name == DISTRIBUTION


def test_an_installed_wheel_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lumina.config import installing

    monkeypatch.setattr(installing, "__file__", str(tmp_path / "lumina/config/installing.py"))
    assert shlex.split(install_command("hf")) == ["pip", "install", f"{DISTRIBUTION}[hf]"]
    assert shlex.split(install_command()) == ["pip", "install", DISTRIBUTION]
