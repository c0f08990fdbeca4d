"""Placement of the ranks that share rows: on which nodes each group is, and what would keep it on one.

A group is so many neighbouring ranks, and launchers number ranks as they please: node by node (block), or in turn over
the nodes (cyclic), where no two neighbours are on one node.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_MOST = 4  # nodes that are named


class RankNode(NamedTuple):
    """Where a rank runs. identity: the same on all ranks of a node, unless each has a container with a host name of its
    own; name: for people."""

    identity: str
    name: str


def own_node(environment: Mapping[str, str] = os.environ) -> RankNode:
    """This process's node."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    host, of_slurm = socket.gethostname(), environment.get("SLURMD_NODENAME", "")
    return RankNode(f"{boot} {host} {of_slurm}", of_slurm or host)


def shared_rows(size: int, nodes: Sequence[RankNode]) -> tuple[str, str | None]:
    """Where the groups are of `size` neighbouring ranks, which share rows, for people; and what to do where more of
    them than must be are across nodes. nodes: of each rank, in order."""
    groups = _groups(size, nodes)
    across = [number for number, group in enumerate(groups) if len(set(group)) > 1]
    ranks_of: dict[RankNode, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks_of.setdefault(node, []).append(rank)
    if not across:
        shown = [f"{node.name}: {_ranks(ranks)}" for node, ranks in list(ranks_of.items())[:_MOST]]
        more = f"; and {len(ranks_of) - _MOST} more" if len(ranks_of) > _MOST else ""
        return f"each group on one node ({'; '.join(shown)}{more})", None
    first = across[0] * size
    some = _names(node.name for node in dict.fromkeys(groups[across[0]]))
    which = f"{len(across)} of {len(groups)} groups, such as " if len(groups) > 1 else ""
    where = f"across nodes ({which}{_ranks(range(first, first + size))} on {some}): attention waits for the network"
    return where, _remedy(size, nodes, [*map(len, ranks_of.values())])


def _remedy(size: int, nodes: Sequence[RankNode], counts: list[int]) -> str | None:
    """What keeps more groups on one node. counts: ranks of each node."""
    order = list(dict.fromkeys(nodes))
    if _spread(size, sorted(nodes, key=order.index)) < _spread(size, nodes):
        return (
            "neighbouring ranks are on different nodes: number the ranks node by node (srun --distribution=block, "
            "mpirun --map-by slot)"
        )
    if size <= max(counts):
        return (
            f"the nodes have {_names(map(str, counts))} ranks: with a multiple of {size} on each no group is across "
            "nodes (slots=N in the hostfile, --ntasks-per-node)"
        )
    return None  # no node has so many ranks, and a smaller size may not fit


def _groups(size: int, nodes: Sequence[RankNode]) -> list[Sequence[RankNode]]:
    return [nodes[start : start + size] for start in range(0, len(nodes), size)]


def _spread(size: int, nodes: Sequence[RankNode]) -> int:
    """Nodes of a group, summed over the groups."""
    return sum(len(set(group)) for group in _groups(size, nodes))


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 4`, `ranks 0-3`, `ranks 0, 2, 4, 6 and 28 more`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"ranks {_names(map(str, ranks))}"


def _names(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:_MOST]) + (f" and {len(found) - _MOST} more" if len(found) > _MOST else "")
