"""A transport of another installed package: offered by the command line, and what it says starts a node's agent."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lumina.cli import main
from lumina.cluster.hostfile import Host
from lumina.cluster.transport import RemoteModule, remote_command
from lumina.config import UserError

SHELL = """
class Shell:
    def command(self, host, remote):
        return ["sh", "-c", "# " + host.name + "\\n" + remote.shell()]

THING = Shell()
"""


def test_it_is_a_choice_and_makes_every_nodes_command(
    install: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("n0 slots=2\nn1 slots=1\n")
    words = ["launch", "--hostfile", str(tmp_path / "hosts"), "--transport", "shell", "--dry-run", "--", "train"]
    with pytest.raises(SystemExit):
        main(words)
    assert "invalid choice: 'shell'" in capsys.readouterr().err
    install("lumina.transports", "shell", SHELL)
    assert main(words) == 0
    shown = "\n".join(line for line in capsys.readouterr().out.splitlines() if not line.startswith("# "))
    commands = shlex.split(shown, comments=False)
    assert commands[:2] == ["sh", "-c"]
    assert [word.splitlines()[0] for word in commands if word.startswith("# n")] == ["# n0", "# n1"]
    assert shown.count("-m lumina.cluster.elastic.agent -") == 2


def test_its_command_runs_a_module_in_a_folder(install: Callable[..., None], tmp_path: Path) -> None:
    install("lumina.transports", "shell", SHELL)
    (tmp_path / "told.py").write_text("import pathlib, sys\nprint(pathlib.Path.cwd(), sys.stdin.read())\n")
    command = remote_command("shell", Host("n0", 1), RemoteModule("told", str(tmp_path), sys.executable))
    done = subprocess.run(command, input="the spec", capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path} the spec\n"


def test_one_that_does_not_load_names_its_package(install: Callable[..., None]) -> None:
    install("lumina.transports", "shell", "import nothing_of_this_name\n")
    with pytest.raises(UserError, match=r"the transport shell \(staircase:THING, of staircase\) does not load"):
        remote_command("shell", Host("n0", 1), RemoteModule("told", "/"))
