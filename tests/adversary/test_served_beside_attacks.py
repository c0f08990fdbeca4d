"""Honest clients beside all attacks at once: benchmarks/serve_attack.py for a few seconds, without a bound of time."""

from __future__ import annotations

import importlib.util
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_attack.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_attack", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serve_attack", module)
    spec.loader.exec_module(module)
    return module


def test_all_honest_requests_are_answered(script: ModuleType) -> None:
    attacks = list[Future[dict[str, int]]]()
    with ThreadPoolExecutor(1) as pool, script.serving("nano", 2) as port:
        found = script.compare(
            port, 2, 2.0, 4, lambda: attacks.append(pool.submit(script.attack, port, 2.0)), lambda: attacks[0].result()
        )
    assert min(found["attempts"].values()) > 0
    assert found["attempts"].keys() == {"slow heads", "big bodies", "vanishing", "hostile fields"}
    for half in ("undisturbed", "attacked"):
        assert found[half]["requests"] > 0
        assert found[half]["not answered"] == 0
