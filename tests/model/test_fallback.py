"""Without the compiled CPU loops - switched off, no compiler, or one that fails - training is the same, only slower.

Each case runs in a process of its own, since the choice is made once per process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina.model import cpu

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
import torch
from tests.model.tiny_models import make_model, pack
from lumina.model import cpu
model, batch = make_model(dtype=torch.bfloat16), pack([30, 1, 270], supervised=0.7)
loss = model(*batch)
loss.backward()
norms = {name: p.grad.to_dense().double().norm().item() for name, p in model.named_parameters()}
print(json.dumps({"compiled": cpu.lib() is not None, "loss": loss.item(), "norms": norms}))
"""


def outcome(**environment: str) -> tuple[dict[str, Any], str]:
    """(what the program found, its warnings)."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("LUMINA_KERNELS", "LUMINA_CPU_KERNELS")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=inherited | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found, done.stderr


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """The compiled path, built into a fresh cache."""
    if shutil.which("cc") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        pytest.skip("no C compiler here: there is nothing to compare with")
    found, _ = outcome()
    assert found["compiled"]
    return found


def empty_bin(folder: Path) -> str:
    folder.mkdir()
    return str(folder)


def broken_bin(folder: Path) -> str:
    """A PATH whose C compiler fails."""
    folder.mkdir()
    compiler = folder / "cc"
    compiler.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    compiler.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("case", ["switched off", "no compiler", "broken compiler"])
def test_the_same_loss_without_the_compiled_loops(case: str, reference: dict[str, Any], tmp_path: Path) -> None:
    environments = {
        "switched off": lambda: {"LUMINA_CPU_KERNELS": "0"},
        "no compiler": lambda: {"PATH": empty_bin(tmp_path / "bin"), "LUMINA_CACHE": str(tmp_path / "cache")},
        "broken compiler": lambda: {"PATH": broken_bin(tmp_path / "bin"), "LUMINA_CACHE": str(tmp_path / "cache")},
    }
    found, warnings = outcome(**environments[case]())
    assert not found["compiled"]
    # bfloat16 keeps 8 bits: a few roundings apart, not more.
    assert found["loss"] == pytest.approx(reference["loss"], rel=4e-3)
    assert found["norms"] == pytest.approx(reference["norms"], rel=0.03)
    said = {"switched off": "", "no compiler": "no C compiler", "broken compiler": "no such header"}
    assert said[case] in warnings


def test_the_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    monkeypatch.setenv("LUMINA_CACHE", str(tmp_path / "cache"))
    built = cpu._build(cpu._SOURCE)
    assert built is not None
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [built.name]  # no scratch is left
    monkeypatch.setattr(subprocess, "run", None)  # a second build would fail
    assert cpu._build(cpu._SOURCE) == built


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUMINA_CACHE", str(tmp_path / "file" / "cache"))
    assert cpu._build(cpu._SOURCE) is None


def test_other_types_and_tracing_take_plain_torch() -> None:
    assert not cpu.usable(torch.zeros(1))
    assert not cpu.usable(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1))
