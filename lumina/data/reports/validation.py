"""`lumina validate-data`: the reader, template and cutter of training over whole files, and a survey of what they saw.

What validates trains: the records go through the same functions, only nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from lumina.chat import TEXT_ROLE, Conversation, Tokenizer
from lumina.config.errors import UserError
from lumina.data.account import Account
from lumina.data.cache.files import replace_durably
from lumina.data.formats import convert
from lumina.data.preparing.building import Progress, line_bases, merge_accounts
from lumina.data.preparing.pool import run_tasks, usable_cores
from lumina.data.preparing.preparation import plan_tasks
from lumina.data.preparing.statistics import LENGTHS, Survey, percentiles, windows
from lumina.data.reading.items import read_items
from lumina.data.reading.layout import detect
from lumina.data.reading.paths import check_inputs
from lumina.data.records.fault import BLANK, Fault, Tree


@dataclass(frozen=True)
class Validation:
    """The outcome: the account of every line, the survey, and each file's layout in words."""

    account: Account
    survey: Survey
    layouts: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON data, without the sample conversations."""
        survey = self.survey
        return {
            "files": self.layouts,
            "account": self.account.to_dict(),
            "formats": survey.formats,
            "roles": survey.roles,
            "languages": survey.languages,
            "scripts": survey.scripts,
            "turns": percentiles(survey.turns),
            **{name: percentiles(getattr(survey, name)) for name in LENGTHS},
            "windows": windows(survey.conversation_tokens),
            "duplicates": survey.duplicates(),
            "findings": {what: {"count": f.count, "first": f.first} for what, f in survey.findings.items()},
        }


@dataclass(frozen=True)
class _Whole:
    """Settings under which nothing is cut: validation looks at the conversations as they are."""

    seq_length: int = 1 << 30
    packing: bool = False
    overlong: str = "split"
    cache_dir: str | None = None
    num_workers: int | None = None


def validate(
    paths: Sequence[str], tokenizer: Tokenizer, *, workers: int | None = None, progress: Progress | None = None
) -> Validation:
    """Reads whole files as training would.

    Raises:
        UserError: a file is missing or empty. Bad lines are no error here: they are what is asked for.
    """
    files = check_inputs(paths)
    tasks = plan_tasks(files, "survey", None, _Whole())
    reports: dict[int, dict[str, Any]] = {}
    total, seen = sum(task.stop - task.start for task in tasks), 0

    def done(number: int, report: dict[str, Any]) -> None:
        nonlocal seen
        reports[number] = report
        seen += tasks[number].stop - tasks[number].start
        if progress is not None:
            progress(seen, total)

    run_tasks(list(enumerate(tasks)), workers or min(usable_cores(), 16), tokenizer, done)
    ordered = [reports[i] for i in range(len(tasks))]
    account = merge_accounts(tasks, ordered, "split", 0)
    account.check()
    survey = Survey()
    for task, report, base in zip(tasks, ordered, line_bases(tasks, ordered), strict=True):
        survey.merge(Survey.from_dict(report["survey"]), task.path, base)
    return Validation(account, survey, {str(path): detect(str(path)).describe() for path in files})


def fix(paths: Sequence[str], out: Path, tokenizer: Tokenizer) -> tuple[int, int, Path]:
    """Writes what is sound as messages JSON lines to `out`, and what is not, with its reason, to a file beside it.

    Returns (conversations written, records rejected, the rejects' path). Both files appear when whole.
    """
    files = check_inputs(paths)
    rejects = out.with_name(out.name + ".rejected.jsonl")
    if any(path.resolve() in (out.resolve(), rejects.resolve()) for path in files):
        raise UserError(f"{out} is one of the inputs", "Name another file after --fix.")
    partial = [path.with_name(path.name + ".tmp") for path in (out, rejects)]
    written = rejected = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(partial[0], "wb") as good, open(partial[1], "wb") as bad:
        for path in files:
            for item in read_items(str(path), detect(str(path))):
                if item.record is BLANK:
                    continue
                found = convert(item.record)
                if isinstance(found, Fault):
                    bad.write(orjson.dumps(_reject(path, item.number, found, item.record)) + b"\n")
                    rejected += 1
                    continue
                for conversation in found.conversations if isinstance(found, Tree) else [found]:
                    good.write(orjson.dumps(_sound(conversation)) + b"\n")
                    written += 1
    for source, path in zip(partial, (out, rejects), strict=True):
        replace_durably(source, path)
    return written, rejected, rejects


def _sound(conversation: Conversation) -> dict[str, Any]:
    """The canonical record of a conversation: reading it again gives the same one."""
    identity = {"id": conversation.id} if conversation.id else {}
    if conversation.messages[0].role == TEXT_ROLE:
        return {**identity, "text": conversation.messages[0].content}
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        entry: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.masked:
            entry["train_detail"] = [
                {"begin_offset": start, "end_offset": end - 1, "train": False} for start, end in message.masked
            ]
        messages.append(entry if message.learn else {**entry, "weight": 0})
    return {**identity, "messages": messages}


def _reject(path: Path, number: int, fault: Fault, record: Any) -> dict[str, Any]:
    """A rejected record with its place and reason; what was no JSON goes in as text."""
    held = fault.raw.decode("utf-8", "backslashreplace") if isinstance(record, Fault) else record
    entry = {"source": f"{path}:{number}", "reason": fault.reason, "detail": fault.detail, "record": held}
    try:
        orjson.dumps(entry)
    except (TypeError, orjson.JSONEncodeError):  # a Parquet value that JSON has no form for
        entry["record"] = repr(held)
    return entry
