"""The exact commands that start an agent on a node, and `lumina launch --dry-run`, which shows them."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lumina.cli import main
from lumina.cluster.hostfile import Host
from lumina.cluster.launching import rank_command
from lumina.cluster.transport import RemoteModule, choose, launcher_environment, remote_command
from lumina.config import UserError
from tests.runs import clean_environment

FOLDER = "/home/ann o'hara/50% done"  # a blank, a quote, and what pdsh would replace
PYTHON = "/opt/my env/bin/python"
N1 = Host("n1", 4)


def test_local() -> None:
    assert remote_command("local", N1, RemoteModule("m", FOLDER, PYTHON)) == [PYTHON, "-m", "m", "-"]


def test_ssh() -> None:
    command = remote_command("ssh", N1, RemoteModule("lumina.cluster.elastic.agent", FOLDER, PYTHON))
    assert command[0] == "ssh"
    assert command[-2] == "n1"
    assert "BatchMode=yes" in command, "it must never ask for a password"
    words = shlex.split(command[-1])  # as the shell on n1 reads it
    assert words[:3] == ["cd", FOLDER, "&&"]
    assert words[-6:] == ["env", "TORCH_CPP_LOG_LEVEL=ERROR", PYTHON, "-m", "lumina.cluster.elastic.agent", "-"]


def test_pdsh() -> None:
    command = remote_command("pdsh", N1, RemoteModule("m", FOLDER, PYTHON))
    assert command[: command.index("n1") + 1] == ["pdsh", "-S", "-N", "-R", "ssh", "-w", "n1"]
    assert command[-1].endswith("{spec}")
    assert shlex.split(command[-1].replace("%%", "%"))[1] == FOLDER
    assert "%" not in command[-1].replace("%%", "")
    assert launcher_environment({"PDSH_RCMD_TYPE": "rsh"})["PDSH_RCMD_TYPE"] == "ssh"
    ours = launcher_environment({})["PDSH_SSH_ARGS_APPEND"]
    own = launcher_environment({"PDSH_SSH_ARGS_APPEND": "-p 2222"})["PDSH_SSH_ARGS_APPEND"]
    assert own == f"-p 2222 {ours}", "the user's, and before ours: ssh takes the first of two"


def test_srun() -> None:
    command = remote_command("srun", N1, RemoteModule("m", FOLDER, PYTHON, cpus=16))
    assert command[0] == "srun"
    for option, value in (("--nodelist", "n1"), ("--chdir", FOLDER), ("--cpus-per-task", "16")):
        assert command[command.index(option) + 1] == value
    assert command[-4:] == [PYTHON, "-m", "m", "-"]
    assert "--cpus-per-task" not in remote_command("srun", N1, RemoteModule("m", FOLDER, PYTHON))


def test_this_machine_needs_no_ssh() -> None:
    assert choose("auto", Host(socket.gethostname(), 1)) == "local"
    assert choose("auto", Host("localhost", 1)) == "local"
    assert choose("auto", N1) == "ssh"
    assert choose("pdsh", Host("localhost", 1)) == "pdsh"


def test_what_a_rank_runs() -> None:
    assert rank_command(["launchers/train.py", "--seed", "3"], "py") == ["py", "launchers/train.py", "--seed", "3"]
    for words in ([], ["evaluate"], ["python", "x.py"]):
        with pytest.raises(UserError, match="runs `train …` or a Python script"):
            rank_command(words)


def test_train_is_the_installed_lumina_whatever_the_folder(tmp_path: Path) -> None:
    """kernels/ of the working directory would shadow a package, and so would a lumina/."""
    for name in ("lumina", "kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit(99)")
    done = subprocess.run(rank_command(["train", "--help"]), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout


@pytest.mark.parametrize(
    ("transport", "program"), [("ssh", "ssh"), ("pdsh", "pdsh"), ("local", sys.executable), ("auto", "ssh")]
)
def test_a_dry_run_shows_every_node(
    transport: str, program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET", "do not show, me")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("n0 slots=2\nn1 slots=1\nn2 slots=4\n")
    words = ["launch", "--hostfile", str(hostfile), "--transport", transport, "--export", "MY_SECRET", "--dry-run"]
    assert main([*words, "--", "train", "--config", "nano", "--train-data", "a b.jsonl"]) == 0
    out = capsys.readouterr().out
    commands = [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]
    assert [command[0] for command in commands] == [program] * 3
    assert all("lumina.cluster.elastic.agent" in " ".join(command) for command in commands)
    if transport != "local":
        assert [next(w for w in command if w in ("n0", "n1", "n2")) for command in commands] == ["n0", "n1", "n2"]
    for line in ("n0: ranks 0-1", "n1: rank 2", "n2: ranks 3-6"):
        assert f"#   {line}" in out
    assert "MY_SECRET" in out, "the names of the variables that travel"
    assert "do not show" not in out
    each = next(line for line in out.splitlines() if line.startswith("# each rank: "))
    assert shlex.split(each.partition(": ")[2])[-5:] == ["train", "--config", "nano", "--train-data", "a b.jsonl"]


@pytest.mark.parametrize("count", ["0", "3"])
def test_more_nodes_than_there_are(count: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts").write_text("n0\nn1\n")
    line = ["launch", "--hostfile", str(tmp_path / "hosts"), "--min-nodes", count, "--dry-run", "--", "train"]
    assert main(line) == 2
    assert "Choose 1 to 2" in capsys.readouterr().err


def test_without_nodes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(["launch", "--dry-run", "--", "train"]) == 2
    assert "--hostfile" in capsys.readouterr().err


def test_a_port_in_use_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("localhost slots=1\n")
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        assert main(f"launch --hostfile hosts --port {port} -- train --config nano --train-data f".split()) == 2
    assert f"cannot listen at port {port}: Address already in use" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["launch", "--hostfile", "hosts", "--port", "99999", "--", "train"])
    assert stop.value.code == 2


def test_the_port_of_rank_0_in_use_is_refused() -> None:
    """Under a plain launcher, which names it (torchrun holds the store itself)."""
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        program = "from lumina.train.deepspeed import init_process_group; init_process_group()"
        done = subprocess.run(
            [sys.executable, "-P", "-c", program],
            env=clean_environment() | ranks | place,
            capture_output=True,
            text=True,
            check=False,
        )
    assert (
        done.stderr.strip()
        .splitlines()[-2]
        .endswith(f"UserError: cannot listen at port {port}: Address already in use")
    )


def test_one_machine_under_two_names_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would have two agents, and each GPU two ranks."""
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    (tmp_path / "script.py").write_text("raise SystemExit('started')\n")
    assert main(["launch", "--hostfile", str(tmp_path / "hosts"), "--", str(tmp_path / "script.py")]) == 2
    said = capsys.readouterr().out
    assert "127.0.0.1 and localhost are one machine" in said or "localhost and 127.0.0.1 are one machine" in said, said
    assert "group 1" not in said
