"""What Slurm's environment says, beside a real scontrol where there is one."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.cli import main
from lumina.cluster import slurm
from lumina.cluster.hostfile import Host
from lumina.config import UserError

needs_scontrol = pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs Slurm's scontrol")
SCRIPT = Path(__file__).parents[2] / "launchers/train.sbatch"
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("72(x2),36", [72, 72, 36]), ("8", [8]), ("4(x3)", [4, 4, 4]), ("1,2(x2),3", [1, 2, 2, 3]), ("", [])],
)
def test_cpus_of_each_node(text: str, wanted: list[int]) -> None:
    assert slurm.cpus({"SLURM_JOB_CPUS_PER_NODE": text}) == wanted


@pytest.mark.parametrize("text", ["two", "4(2)", "4(x2", "4,,2", "-1", "4(x99999)", "¹", "9" * 5000])
def test_counts_that_slurm_does_not_write_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="no number for each node"):
        slurm.cpus({"SLURM_JOB_CPUS_PER_NODE": text})


@pytest.mark.parametrize("nodelist", ["n[", "n[1", "n]1", "n[]", "n[3-1]", "n[a]", "n[1-9999999]", "a[1-300]b[1-300]",
                                      "n[1][", "a b", ",", "", "a,,b", "n[1--2]", "n[[1]]"])  # fmt: skip
def test_lists_that_slurm_does_not_write_are_refused(nodelist: str) -> None:
    with pytest.raises(UserError, match=r"no node list|more than 65,536 nodes"):
        slurm.expand(nodelist)


def test_no_cpus_outside_an_allocation() -> None:
    assert slurm.cpus({}) == []


@pytest.mark.parametrize(
    ("more", "slots"),
    [
        ({}, 1),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "8"}, 4),
        ({"SLURM_NTASKS_PER_NODE": "4(x2)"}, 4),
        ({"SLURM_GPUS_ON_NODE": "0"}, 1),
        ({"SLURM_GPUS_PER_NODE": "h100:4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "a100:2,h100:4"}, 6),
        ({"SLURM_HET_SIZE": "1", "SLURM_GPUS_ON_NODE": "2"}, 2),
    ],
)
def test_ranks_of_a_node(more: dict[str, str], slots: int) -> None:
    assert slurm.hosts({**ALLOCATION, **more}) == [Host("a", slots), Host("b", slots)]


@pytest.mark.parametrize(
    ("more", "slots"),
    [
        # sbatch --nodes=2 --ntasks=N on nodes of 4 CPUs, in the words of Slurm 22.05
        ({"SLURM_NTASKS": "6", "SLURM_TASKS_PER_NODE": "4,2"}, [4, 2]),
        ({"SLURM_NTASKS": "6", "SLURM_TASKS_PER_NODE": "3(x2)"}, [3, 3]),
        ({"SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "3,1", "SLURM_GPUS_ON_NODE": "8"}, [3, 1]),
        ({"SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "3", "SLURM_TASKS_PER_NODE": "3(x2)"}, [3, 3]),
        # No number of tasks was asked for: a task for each node, or with --exclusive for each CPU.
        ({"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}, [8, 8]),
        ({"SLURM_TASKS_PER_NODE": "64(x2)"}, [1, 1]),
        # A shell of `srun --nodes=1 --ntasks=1 --pty` inside such a job has its own step's counts.
        ({"SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "2"}, [2, 2]),
        ({"SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1", "SLURM_NTASKS_PER_NODE": "3"}, [3, 3]),
    ],
)
def test_tasks_as_slurm_divided_them(more: dict[str, str], slots: list[int]) -> None:
    assert [host.slots for host in slurm.hosts({**ALLOCATION, **more})] == slots


@pytest.mark.parametrize("told", [("SLURM_JOB_ID", "SLURM_JOB_NODELIST"), ("SLURM_JOB_ID",)], ids=["sbatch", "salloc"])
def test_a_heterogeneous_job_is_refused(told: tuple[str, ...]) -> None:
    """A shell of salloc has the nodes of each component under another name."""
    environment = {**{name: ALLOCATION[name] for name in told}, "SLURM_HET_SIZE": "2"}
    assert slurm.in_allocation(environment)
    with pytest.raises(UserError, match="heterogeneous job of 2 components"):
        slurm.hosts(environment)


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scontrol that shows what stands in this file."""
    said, program = tmp_path / "said", tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\n[ "$*" = "--oneliner --details show job 7" ] && cat {said}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return said


@pytest.mark.parametrize(
    ("nodes", "more", "wanted"),
    [
        # salloc --nodes=2 --gpus=3, in the words of Slurm 22.05
        ("Nodes=a CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1)   Nodes=b CPU_IDs=0 Mem=0 GRES=gpu:1(IDX:0)", {}, [2, 1]),
        ("Nodes=a,b CPU_IDs=0-1 Mem=0 GRES=gpu:h100:8(IDX:0-7)", {}, [8, 8]),
        ("Nodes=a,b CPU_IDs=0 Mem=0 GRES=gpu:a100:2(IDX:0,2),gpu:h100:1(IDX:3),shard:5(0/4)", {}, [3, 3]),
        ("Nodes=a,b CPU_IDs=0 Mem=0 GRES=", {}, [1, 1]),
        ("Nodes=a CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1)", {"SLURM_GPUS_ON_NODE": "1"}, [1, 1]),  # told: not asked
        ("Nodes=a CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1)", {"SLURM_GPUS_ON_NODE": "1", "SLURM_GPUS": "3"}, [2, 1]),
    ],
)
def test_gpus_that_only_scontrol_knows(shown: Path, nodes: str, more: dict[str, str], wanted: list[int]) -> None:
    shown.write_text(f"JobId=7 NodeList=a,b JOB_GRES=gpu:3   {nodes} MinCPUsNode=1 TresPerJob=gres:gpu:3\n")
    assert [host.slots for host in slurm.hosts({**ALLOCATION, **more})] == wanted


@pytest.mark.parametrize(("variable", "option"), [("SLURM_GPUS", "--gpus"), ("SLURM_GPUS_PER_TASK", "--gpus-per-task")])
def test_a_step_has_all_gpus_of_its_node(
    shown: Path, variable: str, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """srun takes the job's own options from its environment: all four GPUs on one node, or one."""
    shown.write_text("Nodes=a,b CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0-1)")
    assert launch_in(monkeypatch, **{variable: "4"}) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("srun ")]
    assert [line[line.index(option) + 1] for line in lines] == ["2", "2"]


def launch_in(monkeypatch: pytest.MonkeyPatch, **variables: str) -> int:
    for name, value in (ALLOCATION | variables).items():
        monkeypatch.setenv(name, value)
    return main(["launch", "--slurm", "--dry-run", "--", "train", "--config", "nano"])


def test_idle_gpus_are_warned_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_in(monkeypatch, SLURM_GPUS_ON_NODE="8", SLURM_NTASKS_PER_NODE="1") == 0
    assert "WARNING: 14 of this job's 16 GPUs will be idle" in capsys.readouterr().out
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    assert launch_in(monkeypatch, SLURM_GPUS_ON_NODE="8") == 0
    assert "idle" not in capsys.readouterr().out


def test_a_launch_in_every_task_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_in(monkeypatch, SLURM_STEP_NUM_TASKS="8") == 2
    assert "Start it once, without srun" in capsys.readouterr().err


def test_a_container_and_its_python(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    site = {"LUMINA_SRUN": "--container-image='/a b.sqsh'", "LUMINA_CONTAINER": "apptainer exec --nv x.sif"}
    assert launch_in(monkeypatch, LUMINA_PYTHON="/opt/python", **site) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("srun ")]
    assert [line[line.index("--nodelist") + 1] for line in lines] == ["a", "b"]
    for line in lines:
        start = line.index("--container-image=/a b.sqsh")
        assert line[start + 1 : start + 7] == ["apptainer", "exec", "--nv", "x.sif", "/opt/python", "-m"]


def test_the_batch_script_asks_for_no_number_of_tasks() -> None:
    """One that it asked for would win over a rank on each GPU."""
    options = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert options
    assert not [line for line in options if "ntasks" in line]
    for file in (SCRIPT, SCRIPT.with_name("site.sh.example")):
        subprocess.run(["bash", "-n", str(file)], check=True)


LAUNCHER = """#!/bin/bash
trap 'exit $CODE' USR1
echo started
[ -n "$SIGNALLED" ] || exit $CODE
while true; do /bin/sleep 0.02; done
"""


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler of its own for the signal."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("code", "signalled", "queued"),
    [
        (75, True, True),
        (138, True, True),  # Slurm's warning before there was anything to save
        (1, True, False),
        (143, False, False),  # told to end, by scancel
        (137, False, False),
        (0, False, False),
    ],
)
def test_the_batch_script_ends_as_its_launcher_does(code: int, signalled: bool, queued: bool, tmp_path: Path) -> None:
    """Programs in the places of `lumina`, Slurm's own and its last `sleep`."""
    programs = {
        "lumina": LAUNCHER,
        "squeue": "#!/bin/sh\necho RUNNING\n",
        "scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n',
        "sleep": "#!/bin/sh\n",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    environment |= {"CODE": str(code), "SIGNALLED": "yes" if signalled else ""}
    script = subprocess.Popen(["bash", SCRIPT], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert script.stdout is not None
        assert script.stdout.readline() == "started\n"
        if signalled:
            while not catches(script.pid, signal.SIGUSR1):
                assert script.poll() is None
                time.sleep(0.01)
            script.send_signal(signal.SIGUSR1)
        assert script.wait(60) == code
    finally:
        script.kill()
        script.communicate()
    assert (tmp_path / "requeued").exists() == queued


@pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST"])
def test_outside_an_allocation_is_the_users_mistake(missing: str) -> None:
    environment = {name: value for name, value in ALLOCATION.items() if name != missing}
    assert not slurm.in_allocation(environment)
    with pytest.raises(UserError, match="not inside a Slurm allocation"):
        slurm.hosts(environment)


texts = st.text("abz-_.", min_size=1, max_size=4)
widths = st.integers(1, 4)


@st.composite
def elements(draw: st.DrawFn) -> tuple[str, list[str]]:
    """An element of a node list and the names that it means, counted out one by one."""
    text = draw(texts)
    names = [text]
    for _ in range(draw(st.integers(0, 2))):
        written, numbers = [], []
        for _ in range(draw(st.integers(1, 3))):
            low, more, width = draw(st.integers(0, 120)), draw(st.integers(0, 12)), draw(widths)
            first = f"{low:0{width}d}"
            written.append(first if more == 0 and draw(st.booleans()) else f"{first}-{low + more:0{width}d}")
            for value in range(low, low + more + 1):
                digits = str(value)
                while len(digits) < len(first):
                    digits = "0" + digits
                numbers.append(digits)
        after = draw(st.sampled_from(["", "c", "-ib"]))
        text += "[" + ",".join(written) + "]" + after
        names = [name + digits + after for name in names for digits in numbers]
    return text, names


@given(st.lists(elements(), min_size=1, max_size=3))
def test_a_list_is_expanded_without_scontrol(written: list[tuple[str, list[str]]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        assert slurm.expand(",".join(text for text, _ in written)) == [name for _, names in written for name in names]


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scontrol reads a configuration before it expands a list."""
    (tmp_path / "slurm.conf").write_text("ClusterName=x\nSlurmctldHost=localhost\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))


@needs_scontrol
@pytest.mark.usefixtures("conf")
@pytest.mark.parametrize(
    "nodelist",
    ["login,n7", "n[01-03,7],login", "gpu[8-11]", "r[1-2]c[1-2]", "n[098-101],n[5]", "a-1-[1,3-4]b[001-002]"],
)
def test_as_scontrol_expands(nodelist: str) -> None:
    shown = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
    assert slurm.expand(nodelist) == shown.stdout.split()
