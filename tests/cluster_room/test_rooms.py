"""Imports run one way (docs in CONTRIBUTING.md): training knows the cluster room, which knows nothing of training."""

from __future__ import annotations

import ast
from pathlib import Path

import lumina.cluster

ABOVE = ("lumina.train", "lumina.data", "lumina.infer", "lumina.model", "lumina.cli", "lumina.commands")


def test_the_cluster_room_imports_no_room_above_it() -> None:
    folder = Path(lumina.cluster.__file__).parent
    imported = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {(path.name, alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((path.name, node.module or ""))
    assert any(name == "lumina.config" for _, name in imported), "it found the imports"
    assert not [(path, name) for path, name in imported if name.startswith(ABOVE)]
