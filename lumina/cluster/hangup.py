"""Hangup: the terminal, ssh connection or reader that a process writes to goes away, and the process goes on.

A write to a terminal that is gone fails with EIO, one to a pipe whose reader has ended with EPIPE, and what a print
raises would end a run before it has saved, or a launcher before it has told its agents. Under `nohup` the shell has the
signal ignored, and it stays so.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any


def without_ignored_hangup(numbers: Sequence[signal.Signals]) -> tuple[signal.Signals, ...]:
    """These signals, but not SIGHUP where whoever started this process has it ignored (nohup(1))."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in numbers if number is not signal.SIGHUP or not ignored)


class _Output(io.FileIO):
    """A descriptor that leads to /dev/null from the moment on at which nobody reads it any more."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(memoryview(data).cast("B"))


@contextmanager
def outliving_readers() -> Iterator[None]:
    """In the block nothing that is written to standard output or error raises because its reader is gone. A notebook's
    or a test's own streams stay as they are."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in before.items():
        if type(stream) is io.TextIOWrapper:
            setattr(sys, name, _rewritten(stream))
    after = {name: getattr(sys, name) for name in before}
    try:
        yield
    finally:
        for name, stream in after.items():
            with suppress(OSError, ValueError):
                stream.flush()
            if getattr(sys, name) is stream:
                setattr(sys, name, before[name])


def _rewritten(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """A stream over the same descriptor, as its own is but for its errors."""
    with suppress(OSError, ValueError):
        stream.flush()
    try:
        raw = _Output(stream.fileno(), "w", closefd=False)
    except (OSError, ValueError):  # closed, or of no descriptor
        return stream
    # `python -u` has no buffer between.
    buffer: Any = io.BufferedWriter(raw) if isinstance(stream.buffer, io.BufferedWriter) else raw
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
