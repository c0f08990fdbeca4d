"""Shared by several commands: the parser, options, and the configuration that the flags describe.

Nothing heavier than argparse is imported here or beside it: `lumina --help` reads every command's options.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from lumina.terminal import json_line, say

if TYPE_CHECKING:
    from lumina.config import Config

Arguments = argparse.Namespace


class CommandLineError(Exception):
    """Words that a parser does not take, and whose help says what it takes."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message, remedy)
        self.message, self.remedy = message, remedy


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations (`--max` would silently become `--max-steps`), and errors that are raised."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise CommandLineError(message, f"See: {self.prog} --help")

    def format_help(self) -> str:
        """The help text. `{FAMILIES}` in an option's becomes the names of that registry of lumina.config.registry,
        which is asked only here: importing it takes longer than all the rest of the command line."""
        for action in self._actions:
            if action.help:
                action.help = re.sub(r"\{([A-Z_]+)\}", _names, action.help)
        return super().format_help()


def _names(registry: re.Match[str]) -> str:
    from lumina.config import registry as registries

    return ", ".join(getattr(registries, registry[1]).names())


class Command(NamedTuple):
    """What runs it, whose docstring is its help, and what adds its options. `run` returns the exit code."""

    run: Callable[[Arguments], int]
    add_options: Callable[[Parser], None]


def between(kind: type[int] | type[float], low: float, high: float, *also: float) -> Callable[[str], float]:
    """An argparse type: a number within [low, high], or one of `also`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high or value in also):
            others = "".join(f" or {other:g}" for other in also)
            raise argparse.ArgumentTypeError(f"{text} is outside {low:g} to {high:g}{others}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def json_option(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, messages on stderr")


def config_options(parser: Parser) -> None:
    parser.add_argument(
        "--config", "--preset", dest="config", metavar="PRESET|YAML", help="preset's name or a YAML file (medium)"
    )
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="any setting")


def data_options(group: argparse._ArgumentGroup) -> None:
    columns_option(group)
    group.add_argument("--seq-length", type=int, metavar="N", help="context length in tokens (the preset's)")
    group.add_argument("--packing", action=argparse.BooleanOptionalAction, help="several conversations a row (on)")
    group.add_argument("--overlong", choices=["split", "truncate", "drop"], help="longer than seq_length (split)")
    group.add_argument(
        "--chat-template", metavar="NAME", help="Lumina's own: im-roles-1 or im-roles-2 (newest, or taught)"
    )
    group.add_argument(
        "--overlong-context",
        type=float,
        metavar="F",
        help="share of a split chunk for system message and question (0.25)",
    )
    group.add_argument("--cache-dir", metavar="DIR", help="where prepared data is kept")
    group.add_argument("--num-workers", type=int, metavar="N", help="processes that prepare data (one per core)")
    group.add_argument("--eval-fraction", type=float, metavar="F", help="hold this share out of the training data (0)")
    group.add_argument("--dedup", choices=["none", "exact", "near"], help="remove duplicate conversations (none)")


def columns_option(group: argparse._ArgumentGroup | Parser) -> None:
    group.add_argument("--columns", metavar="FIELD=COLUMN,…", help="what stands where: prompt=question,response=answer")


def add_files(group: argparse._ArgumentGroup, flag: str, text: str) -> None:
    group.add_argument(flag, nargs="+", action="extend", metavar="FILE", help=text)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    say(json_line(value))


def load_config(arguments: Arguments) -> Config:
    """The configuration that the parsed flags describe. A run that is resumed without --config keeps its own, and its
    folder, wherever that is now, unless the flags name another."""
    from lumina.config import DEFAULT_PRESET, Config, load

    given = vars(arguments)
    flags = {name: value for name, value in given.items() if name in Config.model_fields}
    from lumina.checkpoint import run_path

    for name in ("resume", "init_from"):  # RUN is a folder or a name under experiments/, as in every command
        if flags.get(name) not in (None, "auto"):
            flags[name] = str(run_path(flags[name]))
    base = arguments.config
    if base is None and (own := _config_of_resumed_run(flags)) is not None:
        base = str(own)
        if flags["resume"] != "auto" and flags.get("output_dir") is None and flags.get("experiment_name") is None:
            folder = own.resolve().parent
            flags |= {"output_dir": str(folder.parent), "experiment_name": folder.name}
    return load(base or DEFAULT_PRESET, flags, arguments.sets)


def _config_of_resumed_run(flags: dict[str, Any]) -> Path | None:
    from lumina.config import RunConfig

    resume = flags.get("resume")
    if resume is None:
        return None
    if resume == "auto":
        output_dir, name = (
            flags.get(field) or RunConfig.model_fields[field].default for field in ("output_dir", "experiment_name")
        )
        path = Path(output_dir) / name / "config.yaml"
        return path if path.is_file() else None
    from lumina.config import run_config

    return run_config(resume)


def exit_code_of(run: Callable[[], int], disks: bool = True) -> int:
    """Runs a command. Returns its exit code: 2 for a user's mistake, which is told; 130 when it was interrupted.

    A user's mistake is also what a file or a disk did (law 7): LUMINA_DEBUG=1 shows where. What all ranks of a machine
    refuse is told by one of them. disks: False where an OSError may pass by itself and a restart helps, as in the
    middle of training."""
    try:
        return run()
    except KeyboardInterrupt:
        say("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lumina config show medium | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from lumina.config import UserError, user_error
        from lumina.files import FormatError

        if disks and isinstance(error, OSError | FormatError | UnicodeError):
            if os.environ.get("LUMINA_DEBUG") == "1":
                traceback.print_exc()
            error = user_error(error)
        if not isinstance(error, UserError):
            raise
        if not error.repeated:
            say(f"error: {error}", file=sys.stderr)
        return 2
