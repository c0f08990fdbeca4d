"""One task of prepare: a byte range of a file -> a file of chunks and an account. Also the worker process.

A worker reads tasks as JSON lines on stdin and answers each with a JSON line on stdout; it ends when stdin does, so it
does not outlive its parent. It is a fresh process that imports no torch: forking a process that holds CUDA, MPI or
threads is not safe, and `multiprocessing`'s spawn would run the user's main script again.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from lumina.chat import ChatTokenizer, Conversation, RenderedBlock, open_tokenizer
from lumina.config import UserError, user_error
from lumina.data.account import Account, add_counts
from lumina.data.cache.shards import ChunkWriter
from lumina.data.converting.columns import renamed
from lumina.data.formats import convert, format_of
from lumina.data.preparing.chunking import ChunkRule, to_chunks
from lumina.data.preparing.deduplication import DUPLICATE, EVAL, TRAIN, join_signatures, signatures_of
from lumina.data.preparing.statistics import Statistics
from lumina.data.reading.items import read_items
from lumina.data.reading.streams import FileLayout
from lumina.data.records.fault import BLANK, Fault, Tree
from lumina.data.records.fields import FieldTally

ELSEWHERE = {TRAIN: "left for training", EVAL: "held out for evaluation", DUPLICATE: "duplicate"}
BLOCK_BYTES = 1 << 20  # input turned into arrays at a time: bounds a worker's memory


@dataclass(frozen=True)
class Task:
    """Records that begin in bytes [start, stop) of the file at `path`, all when it cannot be split.

    `kind` says what becomes of them: "chunks" are written to `out`, and so are "signatures" for deduplication ("near
    signatures" with MinHash); "statistics" are returned. `layout` holds the fields of FileLayout. With `decisions`, a
    file of one uint8 for each conversation, only those equal to `split` are taken. `format` is what every record has
    to be, if given. `columns`: pairs of a format's field and the file's column that it stands in.
    """

    kind: str
    path: str
    layout: tuple[str, str, bool, str]
    start: int
    stop: int
    out: str
    seq_length: int
    overlong: str
    overlong_context: float = 0.0
    decisions: str = ""
    split: int = TRAIN
    format: str = ""
    columns: tuple[tuple[str, str], ...] = ()

    @property
    def rule(self) -> ChunkRule:
        return ChunkRule(self.seq_length, self.overlong, self.overlong_context)


class ConversationBlock(NamedTuple):
    """Conversations and the record number each comes from."""

    conversations: list[Conversation]
    numbers: list[int]


def read_blocks(task: Task, account: Account, statistics: Statistics | None = None) -> Iterator[ConversationBlock]:
    """The task's conversations, some BLOCK_BYTES of input at a time; every record is entered into `account`, and
    the used ones' formats into `statistics`."""
    block, held, tally = ConversationBlock([], []), 0, FieldTally()
    columns = dict(task.columns)
    decided = np.load(task.decisions) if task.decisions else None
    for item in read_items(task.path, FileLayout(*task.layout), task.start, task.stop):
        account.lines += item.lines
        tally.line = item.number
        if item.record is BLANK:
            account.blank_lines += 1
            continue
        record = renamed(item.record, columns, tally) if columns else item.record
        found = convert(record, task.format, tally)
        tally.end_record(used=not isinstance(found, Fault))
        if isinstance(found, Fault):
            account.fault(found.reason, item.number, found.messages, found.detail, found.example())
            continue
        account.records += item.lines
        if statistics is not None:
            statistics.add_record(format_of(record), record, item.lines)
        conversations = [found] if isinstance(found, Conversation) else found.conversations
        if isinstance(found, Tree):
            add_counts(account.paths_discarded, found.discarded)
        account.conversations += len(conversations)
        if decided is not None:
            own, decided = decided[: len(conversations)], decided[len(conversations) :]
            conversations = _chosen(conversations, own, task.split, account)
        block.conversations.extend(conversations)
        block.numbers.extend([item.number] * len(conversations))
        held += item.size
        if held >= BLOCK_BYTES and block.conversations:
            yield block
            block, held = ConversationBlock([], []), 0
    account.last_line = tally.line
    account.add_fields(tally)
    if block.conversations:
        yield block


def _chosen(
    conversations: list[Conversation], decided: NDArray[np.uint8], split: int, account: Account
) -> list[Conversation]:
    """The conversations of this split; the others are entered as dropped."""
    for conversation, its_split in zip(conversations, decided.tolist(), strict=True):
        if its_split != split:
            account.drop_conversations(ELSEWHERE[its_split], 1)
            account.messages += len(conversation.messages)
            account.drop_messages(ELSEWHERE[its_split], len(conversation.messages))
    return [c for c, its_split in zip(conversations, decided.tolist(), strict=True) if its_split == split]


def rendered(
    tokenizer: ChatTokenizer, block: ConversationBlock, account: Account, seconds: float = 0.0
) -> tuple[RenderedBlock, list[int]]:
    """A block's conversations and their record numbers; those that the chat template does not take are
    entered as dropped. SIGPROF comes when it takes more than `seconds` of a processor; 0: never."""
    if seconds:
        signal.setitimer(signal.ITIMER_PROF, seconds)
    together, refused = tokenizer.render_valid(block.conversations)
    if seconds:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    for number, reason in refused.items():
        count = len(block.conversations[number].messages)
        account.drop_conversations(reason, 1)
        account.messages += count
        account.drop_messages(reason, count)
    return together, [block.numbers[i] for i in together.source.tolist()]


def run_task(tokenizer: ChatTokenizer, task: Task, seconds: float = 0.0) -> dict[str, Any]:
    """Does one task. Returns {"account", "lines" (in the range)}, with "rows" (per record batch) for chunks and
    "statistics" for statistics. `seconds`: see `rendered`."""
    account = Account()
    if task.kind in ("signatures", "near signatures"):
        near = task.kind == "near signatures"
        signatures = join_signatures(
            [
                signatures_of([], near),
                *(signatures_of(block.conversations, near) for block in read_blocks(task, account)),
            ]
        )
        np.savez(task.out, **signatures._asdict())
        return {"account": account.to_dict(), "lines": account.last_line}
    if task.kind == "statistics":
        statistics = Statistics()
        for block in read_blocks(task, account, statistics):
            ids, _ = rendered(tokenizer, block, account, seconds)
            to_chunks(ids, task.rule, account)
            statistics.add(block.conversations, block.numbers, ids)
        return {"account": account.to_dict(), "statistics": statistics.to_dict(), "lines": account.last_line}
    with ChunkWriter(Path(task.out)) as writer:
        for block in read_blocks(task, account):
            block_ids, numbers = rendered(tokenizer, block, account, seconds)
            chunks = to_chunks(block_ids, task.rule, account)
            writer.write(chunks, np.array(numbers, dtype=np.int64)[chunks.conversation])
    return {"account": account.to_dict(), "rows": writer.rows, "lines": account.last_line}


def refusal(task: Task, error: OSError | UserError | MemoryError, most_bytes: int = 0) -> UserError:
    """What kept a task from being done, as it is told: with the folder that was written to, where that is full."""
    if isinstance(error, UserError):
        told = error
    elif isinstance(error, OSError):
        told = user_error(error)
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
            told = UserError(f"{Path(task.out).parent}: {os.strerror(error.errno)}", told.remedy)
        elif error.filename in (None, task.path):
            told = UserError(error.strerror or str(error), told.remedy)
    else:
        remedy = "A record of it is too large: leave it out, or cut it into several."
        # Of a file that cannot be split, and for deduplication, what is held may be the whole file's.
        if not FileLayout(*task.layout).splittable or task.kind in ("signatures", "near signatures"):
            remedy = (
                "A record of it is too large (leave it out, or cut it into several), or what is kept of the whole file"
                " is, as with `--dedup near`: divide the file, or take fewer `--num-workers`: each has more then."
            )
        told = UserError(f"a part of it takes more than {most_bytes / 2**30:.3g} GiB of memory", remedy)
    return UserError(f"cannot prepare {task.path}: {told.message}", told.remedy)


def bound_memory(most_bytes: int) -> None:
    """Bytes of memory that this process may take, files that it maps not counted, and not more than whoever started it
    has allowed it. A record is at most 64 MiB of text, of which a format or a template can make any number."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most_bytes if hard < 0 else min(most_bytes, hard), hard))


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies; elsewhere the end of stdin has to do."""
    if not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main() -> None:
    """The worker process: tasks in, reports out, until stdin ends. An input that cannot be read is reported."""
    die_with_parent()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a stray print must not break the protocol
    gc.disable()  # nothing here makes cycles, and collections over a block's messages took a sixth of the time
    folder, chat_template, block_seconds, most_bytes = sys.argv[1:]
    bound_memory(int(most_bytes))
    tokenizer = open_tokenizer(folder or None, chat_template or None, tried=True)
    tokenizer.warm_up()  # while the parent is still planning
    # A model's own tokenizer and template are programs, which may not end: the kernel ends this process with them.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    seconds = float(block_seconds) if folder else 0.0
    for line in sys.stdin.buffer:
        task = Task(**orjson.loads(line))
        try:
            report = run_task(tokenizer, task, seconds)
        except (OSError, UserError, MemoryError) as error:
            told = refusal(task, error, int(most_bytes))
            report = {"error": told.message, "remedy": told.remedy}
        out.write(orjson.dumps(report) + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
