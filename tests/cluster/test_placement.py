"""Where the ranks that share rows are: by hostfiles and by the orders in which launchers number ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lumina.cluster import RankNode, own_node, shared_rows
from lumina.cluster.hostfile import read_hostfile
from tests.runs import clean_environment


def block(*counts: int) -> list[RankNode]:
    """Ranks numbered node by node, so many on each."""
    return [RankNode(f"machine {n}", f"n{n}") for n, count in enumerate(counts) for _ in range(count)]


def cyclic(nodes: int, each: int) -> list[RankNode]:
    """As srun --distribution=cyclic numbers them."""
    return block(*[1] * nodes) * each


def test_groups_on_one_node() -> None:
    assert shared_rows(2, block(2, 2)) == ("each group on one node (n0: ranks 0-1; n1: ranks 2-3)", None)
    assert shared_rows(1, cyclic(2, 2))[1] is None
    where, remedy = shared_rows(4, block(*[8] * 64))
    assert where.endswith("n3: ranks 24-31; and 60 more)")
    assert remedy is None
    # Neither block nor cyclic, but whole groups: srun --distribution=plane=2.
    plane = block(2, 2) * 2
    assert shared_rows(2, plane) == ("each group on one node (n0: ranks 0, 1, 4, 5; n1: ranks 2, 3, 6, 7)", None)


@pytest.mark.parametrize(
    ("size", "nodes", "where", "remedy"),
    [
        (4, block(2, 2), "across nodes (ranks 0-3 on n0, n1)", None),
        (2, block(1, 1), "across nodes (ranks 0-1 on n0, n1)", None),
        (2, cyclic(2, 2), "across nodes (2 of 2 groups, such as ranks 0-1 on n0, n1)", "number the ranks node by node"),
        # As many nodes as there are, though two would do; and a group that must be across nodes.
        (4, cyclic(4, 2), "across nodes (2 of 2 groups, such as ranks 0-3 on n0, n1, n2, n3)", "node by node"),
        (
            2,
            block(3, 1),
            "across nodes (1 of 2 groups, such as ranks 2-3 on n0, n1)",
            "the nodes have 3, 1 ranks: with",
        ),
        # Of the first node's two ranks, all that rank 0 knows, a group is made.
        (2, block(2, 3, 3), "across nodes (1 of 4 groups, such as ranks 4-5 on n1, n2)", "a multiple of 2 on each"),
        (3, block(2, 2, 2), "across nodes (2 of 2 groups, such as ranks 0-2 on n0, n1)", None),
    ],
)
def test_groups_across_nodes(size: int, nodes: list[RankNode], where: str, remedy: str | None) -> None:
    said, advice = shared_rows(size, nodes)
    assert said == f"{where}: attention waits for the network"
    assert (advice is None) == (remedy is None)
    assert remedy is None or remedy in str(advice)
    if advice is not None and "node by node" in advice:  # then they are on as few nodes as can be
        assert len(set(sorted(nodes)[:size])) < len(set(nodes[:size]))
        assert "node by node" not in str(shared_rows(size, sorted(nodes))[1])


def test_a_hostfile_with_uneven_slots(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What it is called by in a hostfile is what its ranks find themselves on."""
    path = tmp_path_factory.mktemp("hosts") / "hostfile"
    path.write_text("n0 slots=4\nn1 slots=2\nn2 slots=2\n")
    nodes = block(*(host.slots for host in read_hostfile(path)))
    assert shared_rows(2, nodes) == ("each group on one node (n0: ranks 0-3; n1: ranks 4-5; n2: ranks 6-7)", None)
    where, remedy = shared_rows(4, nodes)
    assert where == "across nodes (1 of 2 groups, such as ranks 4-7 on n1, n2): attention waits for the network"
    assert remedy is not None
    assert "the nodes have 4, 2, 2 ranks: with a multiple of 4 on each" in remedy


def test_a_rank_knows_its_node() -> None:
    """The same in another process of this machine, and another by Slurm's name, as where tests run several nodes."""
    assert own_node({"SLURMD_NODENAME": "n7"}).name == "n7"
    assert own_node({"SLURMD_NODENAME": "n7"}) != own_node({"SLURMD_NODENAME": "n8"})
    code = "from lumina.cluster import own_node; print(own_node().identity)"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, env=clean_environment()
    ).stdout
    assert found.strip() == own_node({}).identity.strip()
