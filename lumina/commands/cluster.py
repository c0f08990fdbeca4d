"""Commands of the cluster room."""

from __future__ import annotations

import argparse

from lumina.commands.common import Arguments, Command, Parser, between
from lumina.config import TRANSPORTS


def launch(arguments: Arguments) -> int:
    """Train on many machines; lost ones are done without, returning ones taken in."""
    from lumina.cluster import LaunchOptions, outliving_readers
    from lumina.cluster import launch as run

    words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    given = {name: value for name, value in vars(arguments).items() if name in LaunchOptions.__dataclass_fields__}
    with outliving_readers():
        return run(LaunchOptions(**{**given, "words": words}))


def launch_options(parser: Parser) -> None:
    where = parser.add_argument_group("where")
    where.add_argument("--hostfile", metavar="FILE", help="machines and slots, in DeepSpeed's format")
    where.add_argument("--slurm", action="store_true", help="the nodes of this Slurm allocation (found by itself)")
    where.add_argument(
        "--transport",
        choices=["auto", *TRANSPORTS.names()],
        default="auto",
        help="how nodes are reached (auto)",
    )
    where.add_argument(
        "--port", type=between(int, 0, 65535), default=0, metavar="N", help="of the launcher's store (a free one)"
    )
    where.add_argument("--no-bind", dest="bind", action="store_false", help="do not bind ranks to cores")
    losses = parser.add_argument_group("losses")
    losses.add_argument("--min-nodes", type=int, metavar="M", help="go on with as few nodes as this (all)")
    losses.add_argument(
        "--max-restarts", type=int, default=10, metavar="N", help="failures of ranks to recover from (10)"
    )
    losses.add_argument(
        "--node-timeout", type=float, default=12.0, metavar="S", help="silence that means a lost node (12)"
    )
    losses.add_argument(
        "--stop-timeout", type=float, default=60.0, metavar="S", help="for a save when asked to stop (60)"
    )
    losses.add_argument("--job", metavar="NAME", help="a restart under the same name goes on by itself (a new name)")
    parser.add_argument(
        "--export", dest="exports", action="append", default=[], metavar="NAME[=VALUE]", help="to the ranks"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the exact commands and start nothing")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- train …", help="what every rank runs")


COMMANDS: dict[str, Command] = {
    "launch": Command(launch, launch_options),
}
