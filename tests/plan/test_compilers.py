"""Compilers are looked for where a run needs one, as those that call them do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lumina.config import UserError
from lumina.plan.compilers import refuse_missing_compiler

OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
PLAIN: dict[str, Any] = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}


@pytest.mark.parametrize(
    ("compiled", "document", "on_gpu", "needs"),
    [
        (True, {}, False, "g++"),
        (True, {}, True, "gcc"),
        (False, OFFLOADED, False, "g++"),
        (False, OFFLOADED, True, "g++"),
        (False, PLAIN, True, None),
        (False, {}, False, None),
    ],
)
def test_what_needs_which(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiled: bool,
    document: dict[str, Any],
    on_gpu: bool,
    needs: str | None,
) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if needs is None:
        refuse_missing_compiler(compiled, document, on_gpu)
        return
    with pytest.raises(UserError, match="compiler"):
        refuse_missing_compiler(compiled, document, on_gpu)
    (tmp_path / needs).touch(0o755)
    refuse_missing_compiler(compiled, document, on_gpu)
    monkeypatch.setenv("CXX" if needs == "g++" else "CC", "one-that-is-not-here -O2")
    with pytest.raises(UserError, match="compiler"):
        refuse_missing_compiler(compiled, document, on_gpu)
