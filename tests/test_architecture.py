"""The whole tree keeps to the plan of the house (tests/architecture.py), and what does not is found."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest

from tests.architecture import Tree

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree.read(ROOT)


def test_imports_run_one_way(tree: Tree) -> None:
    assert len(tree.imports) > 500, "it found the imports"
    assert tree.upward() == []


def test_rooms_are_entered_by_their_doors(tree: Tree) -> None:
    assert tree.past_doors() == []


def test_nothing_imports_itself_by_a_detour(tree: Tree) -> None:
    assert tree.circles() == []


#: To be divided; an entry that is no longer needed fails the test too.


def test_no_folder_and_no_file_is_too_large(tree: Tree) -> None:
    assert tree.too_large() == []


def test_what_is_printed_goes_through_the_one_printer(tree: Tree) -> None:
    assert tree.raw_prints() == []
    for planted in ("print(name)", "from rich.console import Console as C\nC().print(name)"):
        assert len(Tree({"lumina/data/a.py": planted}).raw_prints()) == 1


def test_no_text_file_is_in_the_locales_encoding(tree: Tree) -> None:
    assert tree.locale_text() == []


@pytest.mark.parametrize(
    ("file", "line", "finding"),
    [
        ("lumina/config/errors.py", "import lumina.model", "lumina.config must not import lumina.model"),
        ("lumina/infer/repl.py", "from lumina.train import loop", "lumina.infer must not import lumina.train.loop"),
        ("lumina/train/loop.py", "from lumina import infer", "lumina.train must not import lumina.infer"),
        ("lumina/chat/template.py", "from lumina.cli import main", "lumina.chat must not import lumina.cli"),
        ("lumina/data/account.py", "from ..train import loop", "lumina.data must not import lumina.train.loop"),
        ("kernels/rope.py", "from lumina.config import load", "lumina.kernels must not import lumina.config"),
        ("launchers/train.py", "import lumina.train.loop", "launchers must not import lumina.train.loop"),
        ("lumina/chat/template.py", "import lumina.files, lumina.plan", "lumina.chat must not import lumina.plan"),
        ("lumina/files.py", "from lumina import config", "lumina.files must not import lumina.config"),
        (
            "lumina/model/ops.py",
            "import lumina.kernels.bench",
            "lumina.model must not import lumina.kernels.bench",
        ),
        (
            "lumina/chat/template.py",
            "def late():\n    from importlib import import_module\n    import_module('lumina.data')",
            "lumina.chat must not import lumina.data",
        ),
        (
            "lumina/commands/plan.py",
            "from lumina.data.loading import order",
            "lumina.data.loading.order is inside lumina.data: import from its door",
        ),
        (
            "lumina/infer/repl.py",
            "from lumina.checkpoint.format import name_of",
            "lumina.checkpoint.format is inside lumina.checkpoint: import from its door",
        ),
        (
            "lumina/config/errors.py",
            "if TYPE_CHECKING:\n    from lumina.config.schema import Config",
            "lumina.config.errors -> lumina.config.schema -> ",
        ),
        ("lumina/model/rows_again.py", "x = 1\n" * 401, "lumina/model/rows_again.py: 401 lines, at most 400"),
    ],
)
def test_what_is_planted_is_found(tmp_path: Path, tree: Tree, file: str, line: str, finding: str) -> None:
    for folder in ("lumina", "kernels", "launchers"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / file).open("a") as opened:
        opened.write(f"\n{line}" if "x = 1" not in line else line)
    found = set(Tree.read(tmp_path).findings()) - set(tree.findings())
    own = [one for one in found if one.startswith(file) and one.endswith(finding)]
    assert own or any(one.startswith(finding) for one in found), found


def test_a_crowded_folder_is_found(tree: Tree) -> None:
    crowd = {f"lumina/chat/number_{i}.py": "" for i in range(17)}
    assert any(one.startswith("lumina/chat: ") for one in Tree({**tree.sources, **crowd}).too_large())


@pytest.mark.parametrize(
    "call",
    ["p.read_text()", "p.write_text('')", "p.open()", "p.open('a')", "open(p)", "open(p, 'w')", "os.fdopen(1, 'w')"],
)
def test_a_text_file_in_the_locales_encoding_is_found(call: str) -> None:
    named = f"{call[:-1]}{', ' if call[-2] != '(' else ''}encoding='utf-8')"
    kept = ["open(p, 'rb')", "gzip.open(p)", "read_text(p)", "files.read_text(p)", "webbrowser.open(url)", named]
    source = "".join(f"{line}\n" for line in [*kept, call])
    assert [one.partition(" ")[0] for one in Tree({"lumina/data/a.py": source}).locale_text()] == [
        "lumina/data/a.py:7:"
    ]


def test_no_test_file_imports_another() -> None:
    """What several need is a module of its own; and no test finds its helpers by a changed sys.path."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not [name for name in names if re.search(r"(^|\.)(test_|conftest)", name)], path
