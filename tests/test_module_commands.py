"""Modules that users start with `python -m`: their help is help, and writes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import clean_environment


@pytest.mark.parametrize("module", ["lumina.data.chitchat", "lumina.data.everyday", "lumina.train.summary"])
def test_help_writes_nothing_and_unknown_options_are_refused(module: str, tmp_path: Path) -> None:
    for word, code in (("--help", 0), ("--no-such-option", 2)):
        command = [sys.executable, "-P", "-m", module, word]
        done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert f"usage: python -m {module}" in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
