"""The data commands of the command line: plain arguments in, an exit code out.

Text goes to stdout; with `json` exactly one JSON object does. Progress goes to stderr, on a terminal only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson
from rich.console import Console

from lumina.chat import Tokenizer, open_tokenizer
from lumina.config.errors import UserError
from lumina.data.loading.dataset import PackedDataset
from lumina.data.oasst.extraction import THREADS, Options
from lumina.data.preparing.building import Progress
from lumina.data.preparing.preparation import prepare
from lumina.data.preparing.splits import PartSettings, Source, prepare_parts


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")


def _say(lines: Sequence[str]) -> None:
    """Plain lines: file names may hold what rich would take for markup."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in lines:
        console.print(line)


@contextmanager
def _progress_bar(title: str) -> Iterator[Progress | None]:
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
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class CommandSettings(PartSettings, Protocol):
    """What the commands need of the configuration."""

    @property
    def tokenizer(self) -> str | None: ...


@dataclass(frozen=True)
class _Given:
    """A configuration's data settings with the files of the command line in place of its own."""

    train_data: Sequence[str]
    seq_length: int
    packing: bool
    overlong: str
    cache_dir: str | None
    num_workers: int | None
    eval_fraction: float
    dedup: str
    data: Sequence[Source] = ()
    eval_data: Sequence[str] = ()


def prepare_command(files: Sequence[str], config: CommandSettings, *, dry_run: bool = False, json: bool = False) -> int:
    """Prepares the files as training would and prints the account. Exit code 0; UserError when nothing is usable.

    With an eval_fraction, the set held out is prepared too. `dry_run` says what it would come to, from a sample.
    """
    if dry_run:
        from lumina.data.reports.estimate import forecast

        expected = forecast(files, config, open_tokenizer(config.tokenizer))
        if json:
            _print_json(expected.to_dict())
        else:
            _say(expected.report())
        return 0
    given = _Given(
        files,
        config.seq_length,
        config.packing,
        config.overlong,
        config.cache_dir,
        config.num_workers,
        config.eval_fraction,
        config.dedup,
    )
    start = time.perf_counter()
    with _progress_bar("preparing") as progress:
        train, evaluation = prepare_parts(given, open_tokenizer(config.tokenizer), progress=progress)
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


def validate_command(
    file: str | Sequence[str], *, create_report: bool = False, json: bool = False, fix: str | None = None
) -> int:
    """Reads whole files as training would and prints what is in them.

    Args:
        create_report: also write FILE.report.html beside the (first) file.
        fix: write the sound records to this path, and the rest beside it.

    Returns:
        0, or 1 when no record is usable.
    """
    from lumina.data.reports.html import render_report
    from lumina.data.reports.validation import fix as write_fixed
    from lumina.data.reports.validation import validate

    files = [file] if isinstance(file, str) else list(file)
    tokenizer = Tokenizer.load()
    with _progress_bar("validating") as progress:
        validation = validate(files, tokenizer, progress=progress)
    figures = validation.to_dict()
    extra: list[str] = []
    if create_report:
        report = Path(f"{next(iter(validation.layouts))}.report.html")
        report.write_text(render_report(validation), encoding="utf-8")
        figures["report"] = str(report)
        extra.append(f"report         {report}")
    if fix is not None:
        written, rejected, rejects = write_fixed(files, Path(fix), tokenizer)
        figures["fixed"] = {"file": fix, "written": written, "rejected": rejected, "rejects": str(rejects)}
        extra.append(f"fixed          {fix}: {written:,} conversations; {rejects}: {rejected:,} records")
    if json:
        _print_json(figures)
    else:
        _say([*_validation_lines(figures, validation.account.report()), *extra])
    return 0 if validation.account.conversations else 1


def _validation_lines(figures: dict[str, Any], account: list[str]) -> list[str]:
    """The figures as text, the account without its packing lines first."""
    out = [f"{path}: {layout}" for path, layout in figures["files"].items()]
    out += [*account[:3], *account[5:]]
    for what in ("formats", "roles", "languages", "scripts"):
        if figures[what]:
            out.append(f"{what:<15}" + ", ".join(f"{name} {count:,}" for name, count in sorted(figures[what].items())))
    for name in ("turns", "message_tokens", "conversation_tokens", "supervised_tokens"):
        if figures[name]:
            spread = ", ".join(f"{key} {value:,}" for key, value in figures[name].items())
            out.append(f"{name.replace('_', ' '):<20} {spread}")
    for row in figures["windows"]:
        out.append(
            f"window {row['window']:>6,}: {100 * row['longer']:.2f}% of conversations are longer; truncating loses "
            f"{100 * row['lost']:.2f}% of tokens, splitting none; packed rows about {100 * row['fill']:.1f}% full"
        )
    out.append(f"duplicates     {figures['duplicates']:,}")
    for what, finding in sorted(figures["findings"].items()):
        more = ", …" if finding["count"] > len(finding["first"]) else ""
        out.append(f"  look: {what}: {finding['count']:,} ({', '.join(finding['first'])}{more})")
    return out


def process_oasst_command(
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

    `lang` and `tree_state` are comma-separated. The options are those of lumina.data.oasst.extraction.Options.
    """
    from lumina.data.converting.oasst_files import process

    if threads not in THREADS:
        raise UserError(f"--threads {threads} is none of {', '.join(THREADS)}")
    if top_k is not None and (threads != "all" or top_k < 1):
        raise UserError("--top-k is a number from 1 and goes with --threads all")
    if max_conversations is not None and max_conversations < 1:
        raise UserError(f"--max-conversations is {max_conversations}; it must be at least 1")
    if pairs and (threads != "all" or top_k is not None):
        raise UserError("--pairs takes every pair of ranked replies: it goes without --threads and --top-k")
    options = Options(
        threads=threads,
        top_k=top_k,
        languages=frozenset(filter(None, (lang or "").split(","))),
        tree_states=frozenset(tree_state.split(",")),
        include_deleted=include_deleted,
        include_synthetic=include_synthetic,
        min_quality=min_quality,
        max_toxicity=max_toxicity,
    )
    summary = process(Path(input), Path(output), options, max_conversations, pairs)
    if json:
        _print_json(summary.to_dict())
    else:
        _say(summary.lines())
    return 0


def inspect_command(
    files: Sequence[str], config: CommandSettings, *, sample: int = 0, table: bool = False, json: bool = False
) -> int:
    """Shows what the model will see of one sample: text coloured by what is learned, with `table` every token.

    Raises:
        UserError: there is no such sample.
    """
    from lumina.data.reports.inspection import describe, render_sample

    tokenizer = open_tokenizer(config.tokenizer)
    with _progress_bar("preparing") as progress:
        dataset = prepare(files, config, tokenizer, progress=progress)
    if not 0 <= sample < dataset.num_samples:
        raise UserError(f"there is no sample {sample}", f"They are numbered from 0 to {dataset.num_samples - 1:,}.")
    description = describe(dataset, sample, tokenizer)
    if json:
        _print_json(description)
        return 0
    console = Console(soft_wrap=True, highlight=False)
    for line in render_sample(description, tokenizer, table):
        console.print(line)
    return 0
