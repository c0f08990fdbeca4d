"""Many machines: hostfile, Slurm and MPI, what each machine looks like, and jobs that survive losing some of them."""

from typing import TYPE_CHECKING

from lumina.lazy import names_of

if TYPE_CHECKING:
    from lumina.cluster.command_line import launch_command
    from lumina.cluster.hangup import outliving_readers
    from lumina.cluster.launch_identity import first_world, own_launch
    from lumina.cluster.launcher_detection import (
        Launched,
        detect_launcher,
        free_port,
        launched,
        parent_signal,
        refuse_taken_port,
    )
    from lumina.cluster.launching import LaunchOptions, launch
    from lumina.cluster.placement import RankNode, own_node, shared_rows
    from lumina.cluster.preflight.run import preflight_command
    from lumina.cluster.rendezvous import await_key, await_ranks
    from lumina.cluster.signals import (
        EXIT_HUNG,
        EXIT_RESIZE,
        EXIT_STOPPED,
        StoppedEarly,
        StopRequest,
        end_with_parent,
        handlers_kept,
    )
    from lumina.cluster.topology import bind

_HOMES = {
    "EXIT_HUNG": "signals",
    "EXIT_RESIZE": "signals",
    "EXIT_STOPPED": "signals",
    "LaunchOptions": "launching",
    "Launched": "launcher_detection",
    "RankNode": "placement",
    "StopRequest": "signals",
    "StoppedEarly": "signals",
    "await_key": "rendezvous",
    "await_ranks": "rendezvous",
    "bind": "topology",
    "detect_launcher": "launcher_detection",
    "end_with_parent": "signals",
    "first_world": "launch_identity",
    "free_port": "launcher_detection",
    "handlers_kept": "signals",
    "launch": "launching",
    "launch_command": "command_line",
    "launched": "launcher_detection",
    "outliving_readers": "hangup",
    "own_launch": "launch_identity",
    "own_node": "placement",
    "parent_signal": "launcher_detection",
    "preflight_command": "preflight.run",
    "refuse_taken_port": "launcher_detection",
    "shared_rows": "placement",
}

__all__ = [
    "EXIT_HUNG",
    "EXIT_RESIZE",
    "EXIT_STOPPED",
    "LaunchOptions",
    "Launched",
    "RankNode",
    "StopRequest",
    "StoppedEarly",
    "await_key",
    "await_ranks",
    "bind",
    "detect_launcher",
    "end_with_parent",
    "first_world",
    "free_port",
    "handlers_kept",
    "launch",
    "launch_command",
    "launched",
    "outliving_readers",
    "own_launch",
    "own_node",
    "parent_signal",
    "preflight_command",
    "refuse_taken_port",
    "shared_rows",
]

__getattr__ = names_of(__name__, _HOMES)
