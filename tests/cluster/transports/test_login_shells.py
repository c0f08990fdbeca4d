"""Login shells: what ssh and pdsh hand to the one on a node, which may be of csh's family."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lumina.cluster.hostfile import Host
from lumina.cluster.transport import RemoteModule, Spec, remote_command, with_spec

SPEC = Spec("n0:1", "job", "n1", 2, ["true"], {"NAME": "a b'c\"d\n$HOME !x"}, "/")
SAYS = """
import os, pathlib, sys
from lumina.cluster.transport import Spec
given = sys.argv[1]
spec = Spec.load(sys.stdin.readline() if given == "-" else given)
print(pathlib.Path.cwd(), os.environ["TORCH_CPP_LOG_LEVEL"], repr(spec.environment["NAME"]))
"""


@pytest.mark.parametrize("transport", ["ssh", "pdsh"])
@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "zsh", "csh", "tcsh", "fish"])
def test_a_module_is_started_by_every_login_shell(shell: str, transport: str, tmp_path: Path) -> None:
    """sshd runs SHELL -c COMMAND."""
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    folder = tmp_path / "it's a $folder"
    folder.mkdir()
    (folder / "says.py").write_text(SAYS)
    made, text = with_spec(remote_command(transport, Host("n1", 2), RemoteModule("says", str(folder))), SPEC)
    line = made[-1].replace("%%", "%")  # as pdsh hands it on
    done = subprocess.run([shell, "-c", line], cwd="/", input=text, capture_output=True, text=True)
    assert done.stdout == f"{folder} ERROR {SPEC.environment['NAME']!r}\n", done.stderr
