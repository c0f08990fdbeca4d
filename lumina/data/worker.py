"""One task of prepare: a byte range of a file -> a file of pieces and an account. Also the worker process.

A worker reads tasks as JSON lines on stdin and answers each with a JSON line on stdout; it ends when stdin does, so it
does not outlive its parent. It is a fresh process that imports no torch: forking a process that holds CUDA, MPI or
threads is not safe, and `multiprocessing`'s spawn would run the user's main script again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from lumina.chat.template import Conversation, render_many
from lumina.chat.tokenizer import Tokenizer
from lumina.data.account import Account
from lumina.data.cutting import cut
from lumina.data.records import Fault, convert, parse_json
from lumina.data.shards import PieceWriter

BLOCK_BYTES = 1 << 20  # input turned into arrays at a time: bounds a worker's memory


@dataclass(frozen=True)
class Task:
    """Lines that begin in bytes [start, stop) of the file at `path`; pieces go to `out`."""

    path: str
    start: int
    stop: int
    out: str
    window: int
    overlong: str


def read_lines(path: str, start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin in bytes [start, stop) of the file, with their ends. Splits at LF only."""
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the line that byte start - 1 belongs to began before this range
        position = file.tell()
        for line in file:
            if position >= stop:
                return
            position += len(line)
            yield line


def run_task(tokenizer: Tokenizer, task: Task) -> dict[str, Any]:
    """Does one task. Returns {"account", "rows" (per record batch), "lines" (in the range)}."""
    account = Account(overlong=task.overlong, window=task.window)
    block: list[Conversation] = []
    lines: list[int] = []
    held = 0
    with PieceWriter(Path(task.out)) as writer:

        def flush() -> None:
            pieces = cut(render_many(tokenizer, block), task.window, task.overlong, account)
            writer.write(pieces, np.array(lines, dtype=np.int64)[pieces.conversation])
            block.clear()
            lines.clear()

        for number, line in enumerate(read_lines(task.path, task.start, task.stop), 1):
            account.lines += 1
            if line.isspace():
                account.blank_lines += 1
                continue
            found = convert(parse_json(line))
            if isinstance(found, Fault):
                account.fault(found.reason, number, found.messages)
                continue
            account.conversations += 1
            block.append(found)
            lines.append(number)
            held += len(line)
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
    tokenizer = Tokenizer.load()
    tokenizer.encode("")  # read the vocabulary while the parent is still planning
    for line in sys.stdin.buffer:
        try:
            report = run_task(tokenizer, Task(**orjson.loads(line)))
        except OSError as error:
            report = {"error": f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")}
        out.write(orjson.dumps(report) + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
