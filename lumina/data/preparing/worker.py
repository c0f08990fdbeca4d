"""One task of prepare: a byte range of a file -> a file of pieces and an account. Also the worker process.

A worker reads tasks as JSON lines on stdin and answers each with a JSON line on stdout; it ends when stdin does, so it
does not outlive its parent. It is a fresh process that imports no torch: forking a process that holds CUDA, MPI or
threads is not safe, and `multiprocessing`'s spawn would run the user's main script again.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from lumina.chat import AnyTokenizer, Conversation, RenderedBlock, Tokenizer, open_tokenizer, render_many, render_sound
from lumina.data.account import Account, add_counts
from lumina.data.cache.shards import PieceWriter
from lumina.data.formats import convert, format_of
from lumina.data.preparing.chunking import cut
from lumina.data.preparing.deduplication import DUPLICATE, EVAL, TRAIN, join_signs, signs_of
from lumina.data.preparing.statistics import Survey
from lumina.data.reading.items import read_items
from lumina.data.reading.streams import FileLayout
from lumina.data.records.fault import BLANK, Fault, Tree
from lumina.data.records.fields import FieldTally

ELSEWHERE = {TRAIN: "left for training", EVAL: "held out for evaluation", DUPLICATE: "duplicate"}
BLOCK_BYTES = 1 << 20  # input turned into arrays at a time: bounds a worker's memory


@dataclass(frozen=True)
class Task:
    """Records that begin in bytes [start, stop) of the file at `path`, all when it cannot be split.

    `kind` says what becomes of them: "pieces" are written to `out`, "signs" for curation too ("near signs" with
    MinHash), a "survey" is returned. `layout` holds the fields of FileLayout. With `decisions`, a file of one uint8 for
    each conversation, only those equal to `part` are taken. `format` is what every record has to be, if given.
    """

    kind: str
    path: str
    layout: tuple[str, str, bool, str]
    start: int
    stop: int
    out: str
    window: int
    overlong: str
    decisions: str = ""
    part: int = TRAIN
    format: str = ""


class Block(NamedTuple):
    """Conversations and the record number each comes from."""

    conversations: list[Conversation]
    numbers: list[int]


def read_blocks(task: Task, account: Account, survey: Survey | None = None) -> Iterator[Block]:
    """The task's conversations, some BLOCK_BYTES of input at a time; every record is entered into `account`, and
    the used ones' formats into `survey`."""
    block, held, tally = Block([], []), 0, FieldTally()
    decided = np.load(task.decisions) if task.decisions else None
    for item in read_items(task.path, FileLayout(*task.layout), task.start, task.stop):
        account.lines += item.lines
        tally.line = item.number
        if item.record is BLANK:
            account.blank_lines += 1
            continue
        found = convert(item.record, task.format, tally)
        tally.end_record(used=not isinstance(found, Fault))
        if isinstance(found, Fault):
            account.fault(found.reason, item.number, found.messages, found.example())
            continue
        account.records += item.lines
        if survey is not None:
            survey.add_record(format_of(item.record), item.record, item.lines)
        conversations = [found] if isinstance(found, Conversation) else found.conversations
        if isinstance(found, Tree):
            add_counts(account.paths_discarded, found.discarded)
        account.conversations += len(conversations)
        if decided is not None:
            own, decided = decided[: len(conversations)], decided[len(conversations) :]
            conversations = _chosen(conversations, own, task.part, account)
        block.conversations.extend(conversations)
        block.numbers.extend([item.number] * len(conversations))
        held += item.size
        if held >= BLOCK_BYTES and block.conversations:
            yield block
            block, held = Block([], []), 0
    account.last_line = tally.line
    account.add_fields(tally)
    if block.conversations:
        yield block


def _chosen(
    conversations: list[Conversation], decided: NDArray[np.uint8], part: int, account: Account
) -> list[Conversation]:
    """The conversations of this part; the others are entered as dropped."""
    for conversation, its_part in zip(conversations, decided.tolist(), strict=True):
        if its_part != part:
            account.drop_conversations(ELSEWHERE[its_part], 1)
            account.messages += len(conversation.messages)
            account.drop_messages(ELSEWHERE[its_part], len(conversation.messages))
    return [c for c, its_part in zip(conversations, decided.tolist(), strict=True) if its_part == part]


def rendered(tokenizer: AnyTokenizer, block: Block, account: Account) -> tuple[RenderedBlock, list[int]]:
    """A block's conversations and their record numbers; those that an imported model's template does not take are
    entered as dropped."""
    together, refused = render_sound(tokenizer, block.conversations)
    for number, reason in refused.items():
        count = len(block.conversations[number].messages)
        account.drop_conversations(reason, 1)
        account.messages += count
        account.drop_messages(reason, count)
    return together, [number for i, number in enumerate(block.numbers) if i not in refused]


def run_task(tokenizer: AnyTokenizer, task: Task) -> dict[str, Any]:
    """Does one task. Returns {"account", "lines" (in the range)}, with "rows" (per record batch) for pieces and
    "survey" for a survey."""
    account = Account(overlong=task.overlong, window=task.window)
    if task.kind in ("signs", "near signs"):
        near = task.kind == "near signs"
        signs = join_signs(
            [signs_of([], near), *(signs_of(block.conversations, near) for block in read_blocks(task, account))]
        )
        np.savez(task.out, **signs._asdict())
        return {"account": asdict(account), "lines": account.last_line}
    if task.kind == "survey":
        assert isinstance(tokenizer, Tokenizer), "a survey counts Lumina's tokens"
        survey = Survey()
        for block in read_blocks(task, account, survey):
            ids = render_many(tokenizer, block.conversations)
            cut(ids, task.window, task.overlong, account)
            survey.add(block.conversations, block.numbers, ids)
        return {"account": asdict(account), "survey": survey.to_dict(), "lines": account.last_line}
    with PieceWriter(Path(task.out)) as writer:
        for block in read_blocks(task, account):
            block_ids, numbers = rendered(tokenizer, block, account)
            pieces = cut(block_ids, task.window, task.overlong, account)
            writer.write(pieces, np.array(numbers, dtype=np.int64)[pieces.conversation])
    return {"account": asdict(account), "rows": writer.rows, "lines": account.last_line}


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
    tokenizer = open_tokenizer(sys.argv[1] if len(sys.argv) > 1 else None)
    if isinstance(tokenizer, Tokenizer):
        tokenizer.encode_many([" "])  # read the vocabulary while the parent is still planning
    for line in sys.stdin.buffer:
        try:
            report = run_task(tokenizer, Task(**orjson.loads(line)))
        except OSError as error:
            report = {"error": f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")}
        out.write(orjson.dumps(report) + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
