"""The command line: parse, then call the one function of the command. The commands are in lumina/commands.

Exit codes: 0 done, 1 the command found something wrong, 2 the user's mistake (`error: …` on stderr), 130 interrupted;
`train` has its own for a run that saved and stopped on a signal (see lumina.train).
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections.abc import Sequence

from lumina.commands import COMMANDS, Arguments, Command, CommandLineError, Parser, exit_code_of, refuse
from lumina.terminal import Formatter, escape_what_is_missing

_LOCAL_RANK = re.compile(r"--local[-_]rank=\d+")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The whole parser, and the parser of each command."""
    from lumina import __version__

    parser = Parser(prog="lumina", description="Train conversational transformers with DeepSpeed, and talk to them.")
    parser.add_argument("--version", action="version", version=f"lumina {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    each = {}
    for name, command in COMMANDS.items():
        text = command.run.__doc__
        each[name] = commands.add_parser(name, help=text, description=text)
        command.add_options(each[name])
    return parser, each


def parse(argv: Sequence[str]) -> Arguments:
    """Parse, or exit 2 with a did-you-mean for an unknown command or option."""
    if argv and _LOCAL_RANK.fullmatch(argv[0]):  # `deepspeed --module lumina train …` puts it before all else
        argv = argv[1:]
    try:
        return _parse(argv)
    except CommandLineError as error:
        sys.exit(refuse(argv, error))


def _parse(argv: Sequence[str]) -> Arguments:
    parser, each = build_parser()
    if not argv:
        parser.print_help()
        sys.exit(0)
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        parser.error(f"no such command: {argv[0]}.{_hint(argv[0], COMMANDS)}")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        command = each[arguments.command]
        options = [option for option in command._option_string_actions if option.startswith("--")]
        first = unknown[0].partition("=")[0]
        hint = _hint(first, options) if first.startswith("-") else ""
        command.error(f"unknown {'option' if first.startswith('-') else 'argument'}: {unknown[0]}.{hint}")
    return arguments


def _hint(word: str, known: Sequence[str] | dict[str, Command]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code. Without `argv` it is this process's own, which `train` then ends."""
    if argv is None:
        for stream in (sys.stdout, sys.stderr):
            escape_what_is_missing(stream)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    arguments = parse(list(sys.argv[1:] if argv is None else argv))
    arguments.own_process = argv is None
    return exit_code_of(lambda: COMMANDS[arguments.command].run(arguments))


if __name__ == "__main__":
    sys.exit(main())
