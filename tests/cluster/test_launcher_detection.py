"""Every launcher's own way of telling a process its rank, and where the ranks meet."""

from __future__ import annotations

import sys

import pytest

from lumina.cluster.launcher_detection import detect_launcher, launched, parent_signal
from lumina.config import UserError

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def place(environment: dict[str, str]) -> tuple[int, ...]:
    return tuple(int(environment[name]) for name in PLACE)


def open_mpi(rank: int, world: int, local: int, local_world: int) -> dict[str, str]:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    values = zip(names, (rank, world, local, local_world), strict=True)
    return {**{f"OMPI_COMM_WORLD_{name}": str(value) for name, value in values}, "PMIX_NAMESPACE": "prterun-a@1"}


def mpich(rank: int, world: int, local: int, local_world: int) -> dict[str, str]:
    names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    return dict(zip(names, map(str, (rank, world, local, local_world)), strict=True))


def srun(rank: int, world: int, local: int, tasks: str) -> dict[str, str]:
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    step = dict(zip(names, (str(rank), str(world), str(local), tasks), strict=True))
    return {**step, "SLURM_JOB_ID": "42", "SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": "alpha,beta"}


def test_alone() -> None:
    environment: dict[str, str] = {}
    assert detect_launcher(environment) is None
    assert place(environment) == (0, 1, 0, 1)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("127.0.0.1", "0"), "the system chooses a port"


def test_torchrun_is_left_as_it_is() -> None:
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    given |= {"MASTER_ADDR": "n0", "MASTER_PORT": "4711", "GROUP_RANK": "1"}
    environment = dict(given)
    assert detect_launcher(environment) == "torch"
    assert environment == given


def test_deepspeed() -> None:
    given = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
    environment = {**given, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert detect_launcher(environment) == "torch"
    assert place(environment) == (3, 4, 1, 2)
    assert environment["MASTER_ADDR"] == "10.0.0.1"


def test_a_hand_written_rank_has_defaults() -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "1"}
    detect_launcher(environment)
    assert place(environment) == (0, 1, 0, 1)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("127.0.0.1", "29500")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 1, 2)),  # two shells of one machine
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, (1, 2, 1, 2)),
        ({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "job-master-0"}, (3, 4, 0, 1)),  # a Kubernetes pod for each
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "n0"}, (3, 4, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, (3, 4, 3, 4)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n0"}, (3, 4, 1, 4)),
    ],
)
def test_what_a_hand_leaves_out(given: dict[str, str], wanted: tuple[int, ...]) -> None:
    environment = dict(given)
    assert detect_launcher(environment) == "torch"
    assert place(environment) == wanted
    assert {name: environment[name] for name in given} == given


def test_reading_changes_nothing() -> None:
    environment = open_mpi(1, 4, 1, 2)
    before = dict(environment)
    assert launched(environment) == ("Open MPI", 1, 4, 1, 2, ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
    assert environment == before


@pytest.mark.parametrize("slots", [(3, 1), (1, 3), (2, 2), (1, 1, 2)])
@pytest.mark.parametrize("by", ["slot", "node"])
def test_open_mpi_with_uneven_slots_and_either_mapping(slots: tuple[int, ...], by: str) -> None:
    """mpirun --map-by slot fills a machine before the next; --map-by node gives each machine a rank in turn."""
    order = [node for node, count in enumerate(slots) for _ in range(count)]
    if by == "node":
        order = [node for turn in range(max(slots)) for node, count in enumerate(slots) if turn < count]
    for rank, node in enumerate(order):
        local = order[:rank].count(node)
        environment = {**open_mpi(rank, len(order), local, slots[node]), "MASTER_ADDR": "n0", "MASTER_PORT": "29400"}
        assert detect_launcher(environment) == "Open MPI"
        assert place(environment) == (rank, len(order), local, slots[node])
        assert environment["MASTER_ADDR"] == "n0"


@pytest.mark.parametrize(("start", "name"), [(open_mpi, "Open MPI"), (mpich, "MPI")])
def test_mpi_on_one_machine(start: object, name: str) -> None:
    environments = [start(rank, 4, rank, 4) for rank in range(4)]  # type: ignore[operator]
    assert [detect_launcher(environment) for environment in environments] == [name] * 4
    assert [place(environment) for environment in environments] == [(rank, 4, rank, 4) for rank in range(4)]
    assert len({(e["MASTER_ADDR"], e["MASTER_PORT"]) for e in environments}) == 1, "they must all meet at one place"


def test_two_jobs_on_one_machine_meet_at_different_ports() -> None:
    one, other = open_mpi(0, 2, 0, 2), {**open_mpi(0, 2, 0, 2), "PMIX_NAMESPACE": "prterun-b@1"}
    detect_launcher(one)
    detect_launcher(other)
    assert one["MASTER_PORT"] != other["MASTER_PORT"]


@pytest.mark.parametrize("start", [open_mpi, mpich])
def test_mpi_on_several_machines_needs_a_meeting_place(start: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # so Python marks what cannot be imported
    environment = start(2, 4, 0, 2)  # type: ignore[operator]
    with pytest.raises(UserError, match="nothing says where they meet") as raised:
        detect_launcher(environment)
    assert "mpi4py" in str(raised.value.remedy)
    told = {**start(2, 4, 0, 2), "MASTER_ADDR": "n0", "MASTER_PORT": "29400"}  # type: ignore[operator]
    detect_launcher(told)
    assert place(told) == (2, 4, 0, 2)
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("n0", "29400")


def test_slurm_meets_at_its_first_node() -> None:
    environments = [srun(rank, 4, rank % 2, "2(x2)") for rank in range(4)]
    assert [detect_launcher(environment) for environment in environments] == ["Slurm"] * 4
    assert [place(environment) for environment in environments] == [(rank, 4, rank % 2, 2) for rank in range(4)]
    assert {e["MASTER_ADDR"] for e in environments} == {"alpha"}
    assert len({e["MASTER_PORT"] for e in environments}) == 1
    other = {**srun(0, 4, 0, "2(x2)"), "SLURM_STEP_ID": "4"}
    detect_launcher(other)
    assert other["MASTER_PORT"] != environments[0]["MASTER_PORT"]


def test_sruns_pmi_is_not_taken_for_mpich() -> None:
    """srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE as well, but nothing about the node."""
    environment = {**srun(3, 4, 1, "2(x2)"), "PMI_RANK": "3", "PMI_SIZE": "4", "PMI_JOBID": "42.3"}
    assert detect_launcher(environment) == "Slurm"
    assert place(environment) == (3, 4, 1, 2)
    assert environment["MASTER_ADDR"] == "alpha"


def test_mpich_inside_slurm_is_mpich() -> None:
    """Hydra starts one proxy on each node by srun; its ranks inherit the proxy's SLURM_PROCID."""
    environment = {**srun(1, 2, 0, "1(x2)"), **mpich(5, 8, 1, 4), "MASTER_ADDR": "alpha", "MASTER_PORT": "29400"}
    assert detect_launcher(environment) == "MPI"
    assert place(environment) == (5, 8, 1, 4)


def test_a_batch_script_is_alone() -> None:
    environment = {"SLURM_JOB_ID": "42", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "alpha,beta"}
    assert detect_launcher(environment) is None
    assert place(environment) == (0, 1, 0, 1)


def test_only_an_agents_ranks_die_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUMINA_AGENT", raising=False)
    assert parent_signal().name == "SIGTERM"
    monkeypatch.setenv("LUMINA_AGENT", "n0")
    assert parent_signal().name == "SIGKILL"


@pytest.mark.parametrize(("node", "tasks", "local_world"), [("0", "2,1", 2), ("1", "2,1", 1), ("2", "4(x3),2", 4)])
def test_an_uneven_slurm_step(node: str, tasks: str, local_world: int) -> None:
    environment = {**srun(1, 14, 0, tasks), "SLURM_NODEID": node, "MASTER_ADDR": "alpha", "MASTER_PORT": "29500"}
    assert detect_launcher(environment) == "Slurm"
    assert environment["LOCAL_WORLD_SIZE"] == str(local_world)
