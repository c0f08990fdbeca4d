"""`lumina validate-data`: the reader and template of training over whole files, and statistics of what they saw.

What validates trains: the records go through the same functions, only nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lumina.chat import Tokenizer
from lumina.data.account import Account
from lumina.data.preparing.building import OnProgress, column_notes, line_bases, merge_accounts
from lumina.data.preparing.pool import run_tasks, usable_cores
from lumina.data.preparing.preparation import plan_tasks
from lumina.data.preparing.statistics import LENGTHS, Statistics, context_lengths, percentiles
from lumina.data.reading.layout import detect
from lumina.data.reading.paths import check_inputs


@dataclass(frozen=True)
class Validation:
    """The outcome: the account of every line, statistics, and each file's layout in words."""

    account: Account
    statistics: Statistics
    layouts: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON data, without the sample conversations."""
        statistics = self.statistics
        return {
            "files": self.layouts,
            "account": self.account.to_dict(),
            "formats": statistics.formats,
            "roles": statistics.roles,
            "languages": statistics.languages,
            "scripts": statistics.scripts,
            "turns": percentiles(statistics.turns),
            **{name: percentiles(getattr(statistics, name)) for name in LENGTHS},
            "context_lengths": context_lengths(statistics.conversation_tokens),
            "duplicates": statistics.duplicates(),
            "findings": {what: {"count": f.count, "first": f.first} for what, f in statistics.findings.items()},
        }


@dataclass(frozen=True)
class _Whole:
    """Settings under which nothing is split: validation looks at the conversations as they are."""

    seq_length: int = 1 << 30
    packing: bool = False
    overlong: str = "split"
    overlong_context: float = 0.0
    cache_dir: str | None = None
    num_workers: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


def validate(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    *,
    columns: Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: OnProgress | None = None,
) -> Validation:
    """Reads whole files as training would. `columns`: in which columns of them the formats' fields stand.

    Raises:
        UserError: a file is missing or empty, or has not a column that is mapped. Bad lines are no error here:
            they are what is asked for.
    """
    files = check_inputs(paths)
    tasks = plan_tasks(files, "statistics", None, _Whole(columns=columns or {}))
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
    account = Account()
    merge_accounts(tasks, ordered, account)
    account.notes += column_notes(tasks)
    account.check()
    statistics = Statistics()
    for task, report, base in zip(tasks, ordered, line_bases(tasks, ordered), strict=True):
        statistics.merge(Statistics.from_dict(report["statistics"]), task.path, base)
    return Validation(account, statistics, {str(path): detect(str(path)).describe() for path in files})
