"""Commands of the data room."""

from __future__ import annotations

from lumina.commands.common import Arguments, Command, Parser, config_options, data_options, json_option, load_config


def prepare(arguments: Arguments) -> int:
    """Tokenise, mask and pack conversations into the memory-mapped files that training reads."""
    from lumina.data.commands import prepare_command

    return prepare_command(arguments.files, load_config(arguments), dry_run=arguments.dry_run, json=arguments.json)


def _prepare_options(parser: Parser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="conversations, in any format that train reads")
    parser.add_argument("--dry-run", action="store_true", help="counts, time and disk from a sample; writes nothing")
    config_options(parser)
    data_options(parser.add_argument_group("data"))
    json_option(parser)


def validate_data(arguments: Arguments) -> int:
    """Check conversations line by line: what would be trained on, masked or dropped, and why."""
    from lumina.data.commands import validate_command

    return validate_command(
        arguments.files, create_report=arguments.create_report, json=arguments.json, fix=arguments.fix
    )


def _validate_data_options(parser: Parser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="conversations, in any format that train reads")
    parser.add_argument("--create-report", action="store_true", help="also write FILE.report.html")
    parser.add_argument("--fix", metavar="OUT", help="write the sound records to OUT, the others beside it")
    json_option(parser)


def inspect_data(arguments: Arguments) -> int:
    """Show what the model will see of one sample: tokens, what is learned, where documents begin."""
    from lumina.data.commands import inspect_command

    return inspect_command(
        arguments.files,
        load_config(arguments),
        sample=arguments.sample,
        table=arguments.table,
        json=arguments.json,
    )


def _inspect_data_options(parser: Parser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="conversations, in any format that train reads")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="which packed sample, from 0 (0)")
    parser.add_argument("--table", action="store_true", help="also a line for each token: position, id, weight, target")
    config_options(parser)
    data_options(parser.add_argument_group("data"))
    json_option(parser)


def process_oasst(arguments: Arguments) -> int:
    """Turn OpenAssistant message trees into conversations, or into preference pairs."""
    from lumina.data.commands import process_oasst_command

    given = {name: value for name, value in vars(arguments).items() if name not in ("command", "input", "output")}
    return process_oasst_command(arguments.input, arguments.output, **given)


def _process_oasst_options(parser: Parser) -> None:
    parser.add_argument("input", metavar="IN", help="trees or flat messages")
    parser.add_argument("output", metavar="OUT", help="conversations to write (JSONL)")
    parser.add_argument("--pairs", action="store_true", help="pairs of replies that people ranked, for objective dpo")
    parser.add_argument("--max-conversations", type=int, metavar="N", help="stop after N conversations")
    parser.add_argument("--threads", default="all", metavar="WHICH", help="which paths of a tree (all)")
    parser.add_argument("--top-k", type=int, metavar="K", help="the K best-ranked answers at each turn")
    parser.add_argument("--lang", metavar="A,B", help="only these languages")
    parser.add_argument("--tree-state", default="ready_for_export", metavar="A,B", help="only trees in these states")
    parser.add_argument("--include-deleted", action="store_true", help="also messages that were deleted")
    parser.add_argument("--include-synthetic", action="store_true", help="also messages that a model wrote")
    parser.add_argument("--min-quality", type=float, metavar="Q", help="only messages labelled at least this good")
    parser.add_argument("--max-toxicity", type=float, metavar="T", help="only messages labelled at most this toxic")
    json_option(parser)


COMMANDS: dict[str, Command] = {
    "prepare": Command(prepare, _prepare_options),
    "validate-data": Command(validate_data, _validate_data_options),
    "process-oasst": Command(process_oasst, _process_oasst_options),
    "inspect": Command(inspect_data, _inspect_data_options),
}
