"""Commands of the data room: plain arguments in, an exit code out.

Text goes to stdout; with --json exactly one JSON object does. A bar goes to stderr, on a terminal only. Nothing heavy
is imported before a command runs: `lumina --help` reads the options of all of them.
"""

from __future__ import annotations

import codecs
import inspect
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina.commands.common import (
    Arguments,
    Command,
    Parser,
    columns_option,
    config_options,
    data_options,
    json_option,
    load_config,
)
from lumina.files import write_text
from lumina.terminal import console, escape_json, say

if TYPE_CHECKING:
    from lumina.config import Config
    from lumina.data import PackedDataset

log = logging.getLogger("lumina")
_PIECE = 1 << 20  # bytes


def _print_json(value: dict[str, Any]) -> None:
    import orjson

    # A piece at a time: a sample of a million tokens is hundreds of megabytes, and each step would copy all of it.
    text, decoder = memoryview(orjson.dumps(value, option=orjson.OPT_INDENT_2)), codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(text), _PIECE):
        say(escape_json(decoder.decode(text[start : start + _PIECE])), end="")
    say()


def _say(lines: Sequence[str]) -> None:
    """Plain lines: file names may hold what rich would take for markup."""
    for line in lines:
        say(line)


@contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar over bytes of input, on a terminal's stderr; None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress

    columns = (
        progress.TextColumn(title),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def prepare(arguments: Arguments) -> int:
    """Tokenise, mask and pack conversations into the memory-mapped files that training reads."""
    log.info("preparing %s", ", ".join(arguments.files))
    return prepare_files(arguments.files, load_config(arguments), dry_run=arguments.dry_run, json=arguments.json)


def prepare_files(files: Sequence[str], config: Config, *, dry_run: bool = False, json: bool = False) -> int:
    """Prepares the files as training would and prints the account. Exit code 0; UserError when nothing is usable.

    With an eval_fraction, the set held out is prepared too. `dry_run` says what it would come to, from a sample.
    """
    from lumina.chat import open_tokenizer
    from lumina.data import estimate, prepare_splits

    if dry_run:
        expected = estimate(files, config, open_tokenizer(config.tokenizer, config.chat_template))
        if json:
            _print_json(expected.to_dict())
        else:
            _say(expected.report())
        return 0
    given = config.model_copy(update={"train_data": list(files), "data": [], "eval_data": []})
    start = time.perf_counter()
    with _progress_bar("preparing") as progress:
        train, evaluation = prepare_splits(
            given, open_tokenizer(config.tokenizer, config.chat_template), progress=progress
        )
    seconds = time.perf_counter() - start
    if json:
        held_out = {} if evaluation is None else {"held_out": _figures(evaluation)}
        _print_json({**_figures(train), **held_out, "seconds": round(seconds, 3)})
        return 0
    rate = train.account["tokens"] / seconds
    _say([*train.account_lines(), f"cache          {train.folder} ({seconds:.2f} s, {rate:,.0f} tokens/s)"])
    if evaluation is not None:
        _say(["", "held out for evaluation", *evaluation.account_lines(), f"cache          {evaluation.folder}"])
    return 0


def _figures(dataset: PackedDataset) -> dict[str, Any]:
    return {
        "cache": str(dataset.folder),
        "fingerprint": dataset.fingerprint,
        "samples": dataset.num_samples,
        "tokens": dataset.num_tokens,
        "supervised_tokens": dataset.num_supervised,
        "account": dataset.account,
    }


def _prepare_options(parser: Parser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="conversations in any data format: {FORMATS}")
    parser.add_argument("--dry-run", action="store_true", help="counts, time and disk from a sample; writes nothing")
    config_options(parser)
    data_options(parser.add_argument_group("data"))
    json_option(parser)


def validate_data(arguments: Arguments) -> int:
    """Check conversations line by line: what would be supervised, masked or dropped, and why."""
    return validate_files(
        arguments.files,
        create_report=arguments.create_report,
        json=arguments.json,
        fix=arguments.fix,
        columns=arguments.columns,
    )


def validate_files(
    file: str | Sequence[str],
    *,
    create_report: bool = False,
    json: bool = False,
    fix: str | None = None,
    columns: str | Mapping[str, str] | None = None,
) -> int:
    """Reads whole files as training would and prints what is in them.

    Args:
        create_report: also write FILE.report.html beside the (first) file.
        fix: write the valid records to this path, and the rest beside it.
        columns: in which columns of the files the formats' fields stand: `prompt=question,response=answer`.

    Returns:
        0, or 1 when no record is usable.
    """
    from lumina.chat import Tokenizer
    from lumina.config import load
    from lumina.data import render_report, validate, validation_lines, write_fixed

    files = [file] if isinstance(file, str) else list(file)
    tokenizer = Tokenizer.load()
    mapping = load("nano", {"columns": columns}).columns
    with _progress_bar("validating") as progress:
        validation = validate(files, tokenizer, columns=mapping, progress=progress)
    figures = validation.to_dict()
    extra: list[str] = []
    if create_report:
        report = Path(f"{next(iter(validation.layouts))}.report.html")
        write_text(report, render_report(validation), follow=True)
        figures["report"] = str(report)
        extra.append(f"report         {report}")
    if fix is not None:
        written, rejected, rejects = write_fixed(files, Path(fix), mapping)
        figures["fixed"] = {"file": fix, "written": written, "rejected": rejected, "rejects": str(rejects)}
        extra.append(f"fixed          {fix}: {written:,} conversations; {rejects}: {rejected:,} records")
    if json:
        _print_json(figures)
    else:
        _say([*validation_lines(validation), *extra])
    return 0 if validation.account.conversations else 1


def _validate_data_options(parser: Parser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="conversations in any data format: {FORMATS}")
    columns_option(parser)
    parser.add_argument("--create-report", action="store_true", help="also write FILE.report.html")
    parser.add_argument("--fix", metavar="OUT", help="write the valid records to OUT, the others beside it")
    json_option(parser)


def inspect_data(arguments: Arguments) -> int:
    """Show what the model will see of one sample: tokens, what is supervised, where documents begin."""
    return inspect_sample(
        arguments.files,
        load_config(arguments),
        sample=arguments.sample,
        line=arguments.line,
        table=arguments.table,
        whole=arguments.whole,
        json=arguments.json,
    )


def inspect_sample(
    files: Sequence[str],
    config: Config,
    *,
    sample: int = 0,
    line: int | None = None,
    table: bool = False,
    whole: bool = False,
    json: bool = False,
) -> int:
    """Shows what the model will see of one sample: text coloured by what is supervised, with `table` every token; or
    with `line` what becomes of that record of a file, from its raw form to its tokens. Of what is long beginning and
    end, unless `whole`; with `json` all.

    Raises:
        UserError: there is no such sample or record.
    """
    if line is not None:
        return _inspect_record(files, config, line, table=table, whole=whole, json=json)
    from lumina.chat import open_tokenizer
    from lumina.config import UserError
    from lumina.data import SHOWN_ENDS, describe_sample, render_sample
    from lumina.data import prepare as prepare_data

    tokenizer = open_tokenizer(config.tokenizer, config.chat_template)
    with _progress_bar("preparing") as progress:
        dataset = prepare_data(files, config, tokenizer, progress=progress)
    if not 0 <= sample < dataset.num_samples:
        raise UserError(f"there is no sample {sample}", f"They are numbered from 0 to {dataset.num_samples - 1:,}.")
    description = describe_sample(dataset, sample, tokenizer, None if whole or json else SHOWN_ENDS)
    if json:
        _print_json(description)
        return 0
    out = console(soft_wrap=True)
    for text in render_sample(description, tokenizer, table):
        out.print(text)
    return 0


def _inspect_record(files: Sequence[str], config: Config, line: int, *, table: bool, whole: bool, json: bool) -> int:
    from lumina.chat import open_tokenizer
    from lumina.config import UserError
    from lumina.data import SHOWN_ENDS, describe_record, expand, render_record

    (path, *others) = expand(files)
    if others:
        raise UserError(f"--line {line} of which file? There are {len(others) + 1}", "Name one file.")
    tokenizer = open_tokenizer(config.tokenizer, config.chat_template)
    description = describe_record(path, line, config, tokenizer, None if whole or json else SHOWN_ENDS)
    if json:
        _print_json(description)
        return 0
    out = console(soft_wrap=True)
    for text in render_record(description, tokenizer, table, whole):
        out.print(text)
    return 0


def _inspect_data_options(parser: Parser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="conversations in any data format: {FORMATS}")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="which packed sample, from 0 (0)")
    parser.add_argument("--line", type=int, metavar="N", help="instead record N of the file: raw, conversation, tokens")
    parser.add_argument("--table", action="store_true", help="also a line for each token: position, id, weight, target")
    parser.add_argument("--whole", action="store_true", help="all of what is long, not its beginning and end")
    config_options(parser)
    data_options(parser.add_argument_group("data"))
    json_option(parser)


def process_oasst(arguments: Arguments) -> int:
    """Turn OpenAssistant message trees into conversations, or into preference pairs."""
    options = inspect.signature(extract_oasst).parameters
    return extract_oasst(**{name: value for name, value in vars(arguments).items() if name in options})


def extract_oasst(
    input: str,
    output: str,
    *,
    max_conversations: int | None = None,
    threads: str = "all",
    top_k: int | None = None,
    lang: str | None = None,
    tree_state: str = "ready_for_export",
    include_deleted: bool = False,
    include_synthetic: bool = False,
    min_quality: float | None = None,
    max_toxicity: float | None = None,
    pairs: bool = False,
    json: bool = False,
) -> int:
    """Extracts conversations from OASST trees or flat messages, or with `pairs` preference pairs; prints how many, and
    every discard with its reason.

    `lang` and `tree_state` are comma-separated. The options are those of lumina.data.OasstOptions.
    """
    from lumina.config import UserError
    from lumina.data import THREADS, OasstOptions, process_oasst_file

    if threads not in THREADS:
        raise UserError(f"--threads {threads} is none of {', '.join(THREADS)}")
    if top_k is not None and (threads != "all" or top_k < 1):
        raise UserError("--top-k is a number from 1 and goes with --threads all")
    if max_conversations is not None and max_conversations < 1:
        raise UserError(f"--max-conversations is {max_conversations}; it must be at least 1")
    if pairs and (threads != "all" or top_k is not None):
        raise UserError("--pairs takes every pair of ranked replies: it goes without --threads and --top-k")
    options = OasstOptions(
        threads=threads,
        top_k=top_k,
        languages=frozenset(filter(None, (lang or "").split(","))),
        tree_states=frozenset(tree_state.split(",")),
        include_deleted=include_deleted,
        include_synthetic=include_synthetic,
        min_quality=min_quality,
        max_toxicity=max_toxicity,
    )
    summary = process_oasst_file(Path(input), Path(output), options, max_conversations, pairs)
    if json:
        _print_json(summary.to_dict())
    else:
        _say(summary.lines())
    return 0


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
