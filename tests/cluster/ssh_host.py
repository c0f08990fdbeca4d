"""A machine that can ssh to itself, inside this one: `deepspeed --hostfile` will not start without that.

A command runs in its own mount, network and process namespaces (unshare, root only): no way out, a private ~/.ssh with
a key made for the occasion, and a real sshd on port 22 that nobody outside can reach. When the command ends, or is
killed, the kernel takes all of it away; the user's own keys and ports are never touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from runs import PATIENCE, ROOT, clean_environment

NEEDS = [name for name in ("sshd", "ssh", "ssh-keygen", "pdsh", "unshare", "ip") if shutil.which(name) is None]

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or bool(NEEDS),
    reason=f"needs root for namespaces, and these commands (make test-cluster installs them): {NEEDS or 'all here'}",
)

_SCRIPT = """
set -e
ip link set lo up
# DeepSpeed takes the master's address from `hostname -I`, which leaves out loopback: one end of a cable to nowhere.
ip link add lumina0 type veth peer lumina1
ip addr add 10.99.0.1/24 dev lumina0
ip link set lumina0 up
ip link set lumina1 up
mkdir -p ~/.ssh /run/sshd
mount --bind "$HOST/ssh" ~/.ssh
"$(command -v sshd)" -f "$HOST/sshd_config" -E "$HOST/sshd.log"
exec "$@"
"""


def prepare(folder: Path) -> Path:
    """Keys and sshd's configuration in `folder`; what `run` needs."""
    ssh = folder / "ssh"
    ssh.mkdir(parents=True)
    ssh.chmod(0o700)
    for key in (folder / "host_key", ssh / "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
    (ssh / "config").write_text("StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n")
    lines = [f"HostKey {folder / 'host_key'}", "ListenAddress 127.0.0.1", "Port 22", "UsePAM no", "StrictModes no"]
    lines += ["PermitRootLogin yes", f"PidFile {folder / 'sshd.pid'}"]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    return folder


def run(host: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command on the machine; nothing that it started outlives it (a pid namespace of its own)."""
    process = subprocess.Popen(
        ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "bash", "-c", _SCRIPT, "bash", *command],
        cwd=ROOT,
        env={**clean_environment(), "HOST": str(host)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, err)
