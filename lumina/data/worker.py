"""One task of prepare: a byte range of a file -> a file of pieces and an account. Also the worker process.

A worker reads tasks as JSON lines on stdin and answers each with a JSON line on stdout; it ends when stdin does, so it
does not outlive its parent. It is a fresh process that imports no torch: forking a process that holds CUDA, MPI or
threads is not safe, and `multiprocessing`'s spawn would run the user's main script again.
"""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from lumina.chat.template import Conversation, render_many
from lumina.chat.tokenizer import Tokenizer
from lumina.data.account import Account, add_counts
from lumina.data.cutting import cut
from lumina.data.records import BLANK, Fault, Tree, convert
from lumina.data.shards import PieceWriter
from lumina.data.sources import Layout, read_items

BLOCK_BYTES = 1 << 20  # input turned into arrays at a time: bounds a worker's memory


@dataclass(frozen=True)
class Task:
    """Records that begin in bytes [start, stop) of the file at `path`, all when it cannot be split; pieces go to
    `out`. `layout` holds the fields of sources.Layout."""

    path: str
    layout: tuple[str, str, bool]
    start: int
    stop: int
    out: str
    window: int
    overlong: str


def run_task(tokenizer: Tokenizer, task: Task) -> dict[str, Any]:
    """Does one task. Returns {"account", "rows" (per record batch), "lines" (in the range)}."""
    account = Account(overlong=task.overlong, window=task.window)
    block: list[Conversation] = []
    lines: list[int] = []
    held = 0
    with PieceWriter(Path(task.out)) as writer:

        def flush() -> None:
            account.conversations += len(block)
            pieces = cut(render_many(tokenizer, block), task.window, task.overlong, account)
            writer.write(pieces, np.array(lines, dtype=np.int64)[pieces.conversation])
            block.clear()
            lines.clear()

        for item in read_items(task.path, Layout(*task.layout), task.start, task.stop):
            account.lines += item.lines
            if item.record is BLANK:
                account.blank_lines += 1
                continue
            found = convert(item.record)
            if isinstance(found, Fault):
                account.fault(found.reason, item.number, found.messages)
                continue
            if isinstance(found, Tree):
                block += found.conversations
                lines += [item.number] * len(found.conversations)
                add_counts(account.paths_discarded, found.discarded)
            else:
                block.append(found)
                lines.append(item.number)
            account.records += item.lines
            held += item.size
            if held >= BLOCK_BYTES:
                flush()
                held = 0
        if block:
            flush()
    return {"account": asdict(account), "rows": writer.rows, "lines": account.lines}


def main() -> None:
    """The worker process: tasks in, reports out. An error is reported and ends the worker."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a stray print must not break the protocol
    gc.disable()  # nothing here makes cycles, and collections over a block's messages took a sixth of the time
    tokenizer = Tokenizer.load()
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
