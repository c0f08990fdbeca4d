"""A real cluster inside one machine, for tests and for trying failures on a laptop (root, Linux).

A head and some nodes, each with its own network, process table, host name, hosts file and sshd; a bridge joins them,
and nothing leads outside. They share this machine's files, as nodes share a network file system. Nodes can be killed,
cut off, stopped, slowed and brought back, and Slurm can be started on them:

    with Cluster(folder, nodes=2) as cluster:
        job = cluster.start("head", ["lumina", "launch", "--hostfile", cluster.hostfile(), "--", "train", ...])
        cluster.kill("n1")      # everything on it, at once, as when its power goes
        cluster.revive("n1")
        cluster.cut("n0"); cluster.join("n0")           # its cable
        cluster.stop("n0"); cluster.resume("n0")        # SIGSTOP to everything on it
        cluster.slow("n0", delay="50ms")                # its network

Every process lives in a process namespace whose first process is ours: when the cluster is closed, or the test is
killed, the kernel ends them all. `python -m tests.multinode.cluster [NODES]` opens a shell on the head.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
HEAD, BUSY = "head", 3  # BUSY: times as long as alone a machine may take that does other things too
NEEDS = ("sshd", "ssh", "ssh-keygen", "pdsh", "unshare", "nsenter", "ip", "tc")
SLURM_NEEDS = ("slurmctld", "slurmd", "munged", "srun", "sbatch")

_INIT = """
set -e
ip link set lo up
mount --make-rprivate /
mount --bind "$CLUSTER/hosts" /etc/hosts
mkdir -p ~/.ssh /run/sshd
mount --bind "$CLUSTER/ssh" ~/.ssh
for file in ~/.bashrc ~/.bash_profile ~/.profile; do
  [ ! -e $file ] || mount --bind /dev/null $file  # what it starts may leave a lock behind when its node is killed
done
hostname "$NAME"
touch "$CLUSTER/up.$NAME"
while :; do sleep 1000 & wait $!; done
"""


def missing(programs: Sequence[str] = NEEDS) -> list[str]:
    return [name for name in programs if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG


@dataclass
class Node:
    name: str
    address: str
    init: int = 0  # the pid, here outside, of its first process
    holder: subprocess.Popen[bytes] | None = None  # the unshare that made it


@dataclass
class Job:
    """A command running on a node; what it prints goes to `log`."""

    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, patience: float) -> int:
        """The exit code, within `patience` seconds of a machine that does nothing else."""
        try:
            return self.process.wait(BUSY * patience)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {BUSY * patience} s:\n{self.output()[-6000:]}") from None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Cluster:
    """A head (10.77.0.1) and `nodes` nodes n0, n1, … (10.77.0.10 and up)."""

    folder: Path
    nodes: int = 2
    environment: Mapping[str, str] = field(default_factory=dict)

    def __enter__(self) -> Cluster:
        assert not missing(), f"install {missing()}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._jobs: list[Job] = []
        self._groups: list[Path] = []
        self.places = {HEAD: Node(HEAD, "10.77.0.1")}
        self.places |= {f"n{i}": Node(f"n{i}", f"10.77.0.{10 + i}") for i in range(self.nodes)}
        self._write_files()
        try:
            for name in self.places:
                self.revive(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the cluster."""
        for job in self._jobs:
            job.kill()
        for node in reversed(self.places.values()):
            self._end(node)
        for group in self._groups:
            until(lambda g=group: not (g / "cgroup.procs").read_text().strip(), 10, f"{group} is in use")
            group.rmdir()

    def _write_files(self) -> None:
        ssh = self.folder / "ssh"
        ssh.mkdir(mode=0o700, exist_ok=True)
        for key in (self.folder / "host_key", ssh / "id_ed25519"):
            if not key.exists():
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
        (ssh / "config").write_text("StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n")
        lines = [f"{node.address} {node.name}" for node in self.places.values()]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")

    # --- Nodes ---

    def revive(self, name: str) -> None:
        """Start a node that is not there: its namespaces, its cable and its sshd."""
        node = self.places[name]
        assert node.holder is None, f"{name} is running"
        up = self.folder / f"up.{name}"
        up.unlink(missing_ok=True)
        kinds = ["--mount", "--net", "--pid", "--uts", "--fork", "--mount-proc", "--kill-child"]
        node.holder = subprocess.Popen(
            ["unshare", *kinds, "bash", "-c", _INIT],
            env={**os.environ, "CLUSTER": str(self.folder), "NAME": name, "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        until(lambda: up.exists() or node.holder.poll() is not None, 20, f"{name} did not start")
        children = Path(f"/proc/{node.holder.pid}/task/{node.holder.pid}/children").read_text().split()
        node.init = int(children[0])
        self._plug_in(node)
        self._start_sshd(node)

    def _plug_in(self, node: Node) -> None:
        here = ["nsenter", "-t", str(self.places[HEAD].init), "-n", "ip"]
        there = ["nsenter", "-t", str(node.init), "-n", "ip"]
        if node.name == HEAD:
            _run([*here, "link", "add", "br0", "type", "bridge"])
            _run([*here, "addr", "add", f"{node.address}/24", "dev", "br0"])
            _run([*here, "link", "set", "br0", "up"])
            return
        pair = ["type", "veth", "peer", "name", "eth0", "netns", str(node.init)]
        _run([*here, "link", "add", f"v-{node.name}", *pair])
        _run([*here, "link", "set", f"v-{node.name}", "master", "br0", "up"])
        # Its own hardware address, which a node keeps when it starts anew: the others' ARP tables stay right.
        hardware = "02:00:" + ":".join(f"{int(part):02x}" for part in node.address.split("."))
        _run([*there, "link", "set", "eth0", "address", hardware])
        _run([*there, "addr", "add", f"{node.address}/24", "dev", "eth0"])
        _run([*there, "link", "set", "eth0", "up"])

    def _start_sshd(self, node: Node) -> None:
        folder = self.folder
        lines = [f"HostKey {folder / 'host_key'}", "Port 22", "UsePAM no", "StrictModes no", "PermitRootLogin yes"]
        lines += [f"PidFile {folder}/sshd.{node.name}.pid", "MaxStartups 100", *self.sshd_lines(node.name)]
        config = folder / f"sshd.{node.name}.conf"
        config.write_text("\n".join(lines) + "\n")
        self.run(node.name, ["/usr/sbin/sshd", "-f", str(config), "-E", str(folder / f"sshd.{node.name}.log")])

    def sshd_lines(self, name: str) -> list[str]:
        """More lines of a node's sshd_config, kept in FOLDER/sshd.NAME.extra."""
        extra = self.folder / f"sshd.{name}.extra"
        return extra.read_text().splitlines() if extra.exists() else []

    def _end(self, node: Node) -> None:
        if node.holder is None:
            return
        with suppress(ProcessLookupError):
            os.kill(node.init or node.holder.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(node.holder.pid, signal.SIGKILL)
        node.holder.wait()
        node.holder, node.init = None, 0

    # --- Failures ---

    def kill(self, name: str) -> None:
        """SIGKILL for everything on a node at once, as when its power goes. Its cable goes with it."""
        self._end(self.places[name])

    def cut(self, name: str) -> None:
        """Pull a node's cable: nothing arrives any more, and nobody is told."""
        self._ip("link", "set", f"v-{name}", "down")

    def join(self, name: str) -> None:
        """Plug it in again."""
        self._ip("link", "set", f"v-{name}", "up")

    def stop(self, name: str) -> None:
        """SIGSTOP for everything on a node."""
        self._signal_all(name, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self._signal_all(name, signal.SIGCONT)

    def slow(self, name: str, delay: str) -> None:
        """Delay every packet to a node, e.g. by 50ms."""
        _run(["nsenter", "-t", str(self.places[HEAD].init), "-n", "tc", "qdisc", "replace", "dev", f"v-{name}", "root",
              "netem", "delay", delay])  # fmt: skip

    def _ip(self, *words: str) -> None:
        _run(["nsenter", "-t", str(self.places[HEAD].init), "-n", "ip", *words])

    def processes(self, name: str, containing: str = "") -> list[int]:
        """Pids, as seen from outside, of a node's processes whose command line contains a text."""
        space = os.readlink(f"/proc/{self.places[name].init}/ns/pid")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(entry / "ns/pid") == space:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if containing in line and line:
                        found.append(int(entry.name))
        return sorted(found)

    def command_lines(self, name: str, containing: str) -> list[str]:
        """The command lines of those processes, with their start times; for a failure's message."""
        found = []
        for pid in self.processes(name, containing):
            with suppress(OSError):
                said = subprocess.run(["ps", "-o", "pid,ppid,stat,lstart,args", "-ww", "-p", str(pid)],
                                      capture_output=True, text=True, check=False).stdout  # fmt: skip
                found += said.splitlines()[1:]
        return found

    def _signal_all(self, name: str, number: signal.Signals) -> None:
        for pid in self.processes(name):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def memory_group(self, limit: int) -> Path:
        """A memory control group of `limit` bytes (cgroup v1 or v2), joined by writing 0 to its cgroup.procs."""
        root = Path("/sys/fs/cgroup")
        first = (root / "memory").is_dir()
        group = (root / "memory" if first else root) / f"lumina-{os.getpid()}"
        group.mkdir(exist_ok=True)
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
        self._groups.append(group)
        return group

    # --- Commands ---

    def _command(self, name: str, argv: Sequence[str], environment: Mapping[str, str]) -> list[str]:
        values = {
            "PATH": f"{BIN}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
            "HOME": str(Path.home()),
            "LC_ALL": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            **self.environment,
            **environment,
        }
        assigned = [f"{key}={value}" for key, value in values.items()]
        inside = ["nsenter", "-t", str(self.places[name].init), "--mount", "--net", "--uts", "--pid", f"--wd={ROOT}"]
        return [*inside, "env", "-i", *assigned, *argv]

    def run(
        self, name: str, argv: Sequence[str], patience: float = 300.0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node and wait for it; nothing of it is left when that takes too long."""
        job = self.start(name, argv, **environment)
        try:
            code = job.wait(patience)
        except BaseException:
            job.kill()
            raise
        return subprocess.CompletedProcess(list(argv), code, job.output(), "")

    def start(self, name: str, argv: Sequence[str], **environment: str) -> Job:
        """Start a command on a node."""
        log = self.folder / f"job-{len(self._jobs):03d}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                self._command(name, argv, environment),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self._jobs.append(Job(process, log))
        return self._jobs[-1]

    def hostfile(self, slots: int = 1, names: Sequence[str] = ()) -> str:
        """A hostfile of all nodes (or these), written anew."""
        path = self.folder / f"hostfile-{slots}-{'-'.join(names) or 'all'}"
        chosen = names or [name for name in self.places if name != HEAD]
        path.write_text("".join(f"{name} slots={slots}\n" for name in chosen))
        return str(path)

    # --- Slurm ---

    def start_slurm(self, cpus: int = 2, gpus: int = 2) -> None:
        """slurmctld and munged on the head, slurmd on every node; SLURM_CONF is set for every command after that. The
        `gpus` GPUs of a node are plain files."""
        folder = self.folder / "slurm"
        for name in ("", "state", *(f"spool.{name}" for name in self.places)):
            (folder / name).mkdir(exist_ok=True)
        key = folder / "munge.key"
        if not key.exists():
            key.write_bytes(os.urandom(1024))
            key.chmod(0o600)
        socket = folder / "munge.socket"
        lines = [
            "ClusterName=lumina", f"SlurmctldHost={HEAD}", "SlurmUser=root", "SlurmdUser=root", "AuthType=auth/munge",
            f"AuthInfo=socket={socket}", f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool.%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmdPidFile={folder}/slurmd.%n.pid",
            f"SlurmctldLogFile={folder}/slurmctld.log", f"SlurmdLogFile={folder}/slurmd.%n.log",
            "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU", "ReturnToService=2", "SlurmdTimeout=10", "KillWait=30", "MpiDefault=none",
            "SwitchType=switch/none", "JobRequeue=1", "SchedulerType=sched/backfill", "MinJobAge=3600",
            "SlurmctldTimeout=30", "InactiveLimit=0", "JobCompType=jobcomp/none", "GresTypes=gpu",
            "CredType=cred/munge", "SchedulerParameters=requeue_delay=0,batch_sched_delay=0,bf_interval=2",
        ]  # fmt: skip
        names = [name for name in self.places if name != HEAD]
        node = f"CPUs={cpus} Gres=gpu:{gpus} State=UNKNOWN"
        lines += [f"NodeName={n} NodeAddr={self.places[n].address} {node}" for n in names]
        lines += [f"PartitionName=all Nodes={','.join(names)} Default=YES MaxTime=INFINITE State=UP"]
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        for number in range(gpus):
            (folder / f"gpu{number}").touch()  # Slurm counts GPUs by their files
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{gpus - 1}]\n")
        self.environment = {**self.environment, "SLURM_CONF": str(folder / "slurm.conf")}
        munged = ["/usr/sbin/munged", "--force", f"--key-file={key}", f"--socket={socket}",
                  f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
                  f"--seed-file={folder}/munge.seed"]  # fmt: skip
        assert self.run(HEAD, munged).returncode == 0
        done = self.run(HEAD, ["/usr/sbin/slurmctld", "-i"])
        assert done.returncode == 0, done.stdout
        for name in names:
            self.start_slurmd(name)
        until(
            lambda: self.run(HEAD, ["sinfo", "-h", "-o", "%T %D"]).stdout.split() == ["idle", str(len(names))],
            60,
            "Slurm's nodes did not become idle",
        )

    def start_slurmd(self, name: str) -> None:
        done = self.run(name, ["/usr/sbin/slurmd", "-N", name])
        assert done.returncode == 0, done.stdout


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def until(holds: Callable[[], bool], patience: float, otherwise: str | Callable[[], str]) -> None:
    """Wait until something holds; an AssertionError after `patience` seconds of a machine that does nothing else."""
    deadline = time.monotonic() + BUSY * patience
    while not holds():
        assert time.monotonic() < deadline, otherwise if isinstance(otherwise, str) else otherwise()
        time.sleep(0.05)


def main() -> None:
    """Open a shell on the head of a cluster of NODES nodes."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory(prefix="lumina-cluster-") as folder, Cluster(Path(folder), count) as cluster:
        if not missing(SLURM_NEEDS):
            cluster.start_slurm()
        print(f"nodes: {', '.join(cluster.places)}; hostfile: {cluster.hostfile()}; files: {folder}")
        subprocess.run(cluster._command(HEAD, ["bash"], {"TERM": os.environ.get("TERM", "dumb")}), check=False)


if __name__ == "__main__":
    main()
