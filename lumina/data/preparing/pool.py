"""Worker pool of prepare: runs tasks in this process, or in worker processes fed one task at a time."""

from __future__ import annotations

import gc
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from lumina.chat import BLOCK_SECONDS, ChatTokenizer
from lumina.config import UserError, usable_cpus
from lumina.data.preparing.worker import Task, refusal, run_task
from lumina.processes import how_it_ended

# A worker takes about half a second of a core to start, in which a core prepares some 25 MB: with less than this for
# each of them, fewer are faster. Measured on a 16 MB file: 0.75 s of processor time here, 1.7 s in two workers.
BYTES_PER_WORKER = 24 << 20

# Bytes of memory that a worker may take: as an imported tokenizer's own process for a block of conversations
# (lumina.chat), but no more than the machine has, where that suffices; and its share of a machine that has more, since
# a file that cannot be split is one worker's, with the signatures of all its conversations.
_MOST_BYTES, _LEAST_BYTES = 16 << 30, 4 << 30
_NO_MEMORY = (-signal.SIGKILL, -signal.SIGABRT)  # of the kernel, and of a library that is refused some

Report = dict[str, Any]
Done = Callable[[int, Report], None]


def usable_cores() -> int:
    """Cores this process may run on (a batch system may have given it fewer than the machine has)."""
    return len(usable_cpus())


def worker_bytes(workers: int) -> int:
    """The bound of the memory of each of so many workers on this machine."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(min(_MOST_BYTES, max(_LEAST_BYTES, machine)), machine // workers)


def run_tasks(tasks: Sequence[tuple[int, Task]], workers: int, tokenizer: ChatTokenizer, done: Done) -> None:
    """Runs numbered tasks and calls `done(number, report)` as each ends, never twice at once.

    At most `workers` processes, and no more than the input is worth: see BYTES_PER_WORKER.

    Raises:
        UserError: an input could not be read, or a worker process died.
    """
    worth = sum(task.stop - task.start for _, task in tasks) // BYTES_PER_WORKER
    count = min(workers, len(tasks), worth)
    if count <= 1:
        _run_here(tasks, tokenizer, done)
        return
    waiting: queue.SimpleQueue[tuple[int, Task]] = queue.SimpleQueue()
    for item in tasks:
        waiting.put(item)
    finished: queue.SimpleQueue[tuple[int, Report]] = queue.SimpleQueue()
    processes = [_start(tokenizer, worker_bytes(count)) for _ in range(count)]
    threads = [threading.Thread(target=_feed, args=(p, waiting, finished), daemon=True) for p in processes]
    for thread in threads:
        thread.start()
    try:
        for _ in tasks:
            number, report = finished.get()
            if "error" in report:
                raise UserError(report["error"], report["remedy"])
            done(number, report)
    except BaseException:
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            if process.stdin and process.poll() is None:
                with suppress(OSError):  # it was killed right now, and had not read all
                    process.stdin.close()
        for process in processes:
            process.wait()
        for thread in threads:
            thread.join()
        for process in processes:
            if process.stdout:
                process.stdout.close()


def _run_here(tasks: Sequence[tuple[int, Task]], tokenizer: ChatTokenizer, done: Done) -> None:
    """Runs the tasks one after another in this process, as a worker would: without the cycle collector. Its
    memory has no bound: it is the command's own."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number, task in tasks:
            try:
                report = run_task(tokenizer, task)
            except OSError as error:
                raise refusal(task, error) from error
            done(number, report)
    finally:
        if collecting:
            gc.enable()


def _start(tokenizer: ChatTokenizer, most_bytes: int) -> subprocess.Popen[bytes]:
    # This package, and those whose data formats are used here, may be importable only through this process's sys.path
    # (a source tree, a notebook, a test).
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(dict.fromkeys([root, *filter(None, sys.path)]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    which = [str(tokenizer.folder or ""), tokenizer.chat_template or "", str(BLOCK_SECONDS), str(most_bytes)]
    command = [sys.executable, "-m", "lumina.data.preparing.worker", *which]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _feed(
    process: subprocess.Popen[bytes],
    waiting: queue.SimpleQueue[tuple[int, Task]],
    finished: queue.SimpleQueue[tuple[int, Report]],
) -> None:
    """Feeds one worker, a task in, a report out, until nothing waits. A dead worker reports an error for its task."""
    assert process.stdin is not None
    assert process.stdout is not None
    while True:
        try:
            number, task = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            process.stdin.write(orjson.dumps(asdict(task)) + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except (OSError, ValueError):
            answer = b""
        if not answer:
            code = process.wait()
            why = f"a worker process died ({how_it_ended(code)})" + ("; out of memory?" if code in _NO_MEMORY else "")
            if code == -signal.SIGPROF:
                why = f"the model's tokenizer or chat template takes more than {BLOCK_SECONDS:g} s for a part of it"
            finished.put((number, {"error": f"cannot prepare {task.path}: {why}", "remedy": None}))
            return
        finished.put((number, orjson.loads(answer)))
