"""An imported model's tokenizer in a process of its own, in which each step has bounds of time and memory.

A tokenizer.json and a chat template come with a model, from whoever made it, and are programs: a template has loops, a
normalizer replaces by regular expressions. Jinja's sandbox and tokenizers keep them from touching anything else, and
neither bounds what they cost. So they are run in another process, which the kernel ends when a step takes too long; the
next step begins a new one. What stays in this process is ids to text, over a decoder that was checked (escaping.py).

Time is a processor's: that a process is stopped for a while (Ctrl-Z, a batch system), a machine is busy or a disk slow
is no fault of a model's.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, TypeVar

from lumina.chat.conversation import Conversation
from lumina.chat.hf.jinja import RefusalError
from lumina.chat.hf.tokenizer import HFTokenizer, TokenizedSample
from lumina.chat.protocol import BLOCK_SECONDS, MessageSpan, RenderedBlock
from lumina.config import UserError
from lumina.processes import how_it_ended

STEP_SECONDS = 20.0  # of a processor, for a step, and for reading the files
STEP_BYTES = 4 << 30  # of address space; the largest vocabularies take a third of it
# Steps over a block of data, or a conversation of any length: they have BLOCK_SECONDS, and as many times the memory.
_BLOCK_STEPS, _BLOCK_TIMES = frozenset(("render_valid", "message_spans", "tokenize")), 4
# How often its time this process waits for a step, and seconds besides, since the other process has to start.
_WAIT_TIMES, _START = 10, 60.0
_END = 2.0  # seconds for the other process to end
IDLE_SECONDS = 120.0  # without a step after which the process ends; the next step begins another
_OPENED = 4  # tokenizers that are kept; one more costs reading its files again
_NO_MEMORY = 3  # exit code
# What ends it where a step takes too much: its timer; a library that is refused memory; the kernel that has none left.
_OUT_OF_BOUNDS = frozenset((signal.SIGPROF, signal.SIGABRT, signal.SIGKILL))
_CRASHES = frozenset((signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE))


_T = TypeVar("_T")


class OutOfBoundsError(UserError):
    """A step without a result: it took more time or memory than it may, or its process was ended."""


class ProcessEndedError(OutOfBoundsError):
    """The step's process was ended by a signal that is none of its bounds: the next step has a new one."""


class ClosedError(RuntimeError):
    """A step that `close`, in another thread, has ended."""


class _Process:
    """The other process, started with the first step, for all tokenizers of these bounds and this purpose. Steps are
    made one at a time. It ends with this process, when it reads that nobody is there any more."""

    def __init__(self, seconds: float, most_bytes: int, purpose: str) -> None:
        self._seconds, self._most_bytes = seconds, most_bytes
        self._lock = threading.Lock()
        self._running: tuple[subprocess.Popen[bytes], Connection] | None = None
        self._owner = os.getpid()

    def call(
        self,
        number: int,
        folder: Path,
        step: str | Callable[..., Any],
        arguments: Sequence[Any] = (),
        seconds: float | None = None,
    ) -> Any:
        """What the method `step` of tokenizer `number` returns, which is opened from its folder where it is not yet; or
        what the function `step` returns, which concerns the folder. `seconds`: for this step, where it has its own.
        Raises UserError and RefusalError as it does, OutOfBoundsError and ClosedError."""
        allowed = self._seconds if seconds is None else seconds
        with self._lock:
            if self._owner != os.getpid():  # forked: the other process is the parent's
                self._running = None
            fresh = self._running is None
            kind, value, code = self._ask((number, folder, step, arguments, allowed), allowed)
            if kind == "died" and code == 0 and not fresh:  # it had nothing to do for a while
                kind, value, code = self._ask((number, folder, step, arguments, allowed), allowed)
        if kind == "value":
            return value
        if kind == "refused":
            raise RefusalError(value)
        if kind == "error":
            raise UserError(*value)
        if kind == "failed":
            raise RuntimeError(value)
        if kind == "closed":
            raise ClosedError(f"the process of {folder}'s tokenizer was ended meanwhile")
        if kind == "late":
            waited = _patience(self._seconds, allowed)
            raise OutOfBoundsError(
                f"{folder}: the process of its tokenizer has not answered for {waited:.0f} s",
                "It was stopped, or the machine or its disk is busy with something else.",
            )
        if code >= 0 and code != _NO_MEMORY:
            raise RuntimeError(f"the process of {folder}'s tokenizer ended with exit code {code}")
        if code < 0 and -code not in _OUT_OF_BOUNDS:
            how = how_it_ended(code)
            raise ProcessEndedError(f"{folder}: the process of its tokenizer was ended by {how}", _remedy(-code))
        most_bytes = self._most_bytes * (_BLOCK_TIMES if step in _BLOCK_STEPS else 1)
        took_time = code == -signal.SIGPROF
        what = f"more than {allowed:g} s" if took_time else f"more than {most_bytes >> 20} MiB of memory"
        raise OutOfBoundsError(
            f"{folder}: its tokenizer or chat template takes {what} for one step",
            "Its files do not do what a tokenizer does: do not use this model.",
        )

    def _ask(self, request: tuple[Any, ...], seconds: float) -> tuple[str, Any, int]:
        """What the process makes of a request: the kind of its answer, the answer, and its exit code where it has
        ended."""
        child, pipe = self._running or self._start()  # looked at once: `close` in another thread forgets it
        kind: str
        value: Any = None
        try:
            pipe.send(request)
            kind, value = pipe.recv() if _answers(pipe, _patience(self._seconds, seconds)) else ("late", None)
        except (EOFError, OSError):
            kind = "died"
        except BaseException:  # Ctrl-C: the answer that comes later is not the next step's
            self.close()
            raise
        if kind == "died" and (self._running is None or self._running[0] is not child):
            kind = "closed"
        if kind == "died":
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_END)  # its exit code says why
        if kind in ("late", "died"):
            self.close()
            child.wait()
        return kind, value, child.returncode or 0

    def close(self) -> None:
        """End the process, and with it the step that is being made."""
        running, self._running = self._running, None
        if running is not None:
            running[0].kill()
            running[0].wait()

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        here, there = Pipe()
        command = [sys.executable, "-P", "-m", __name__, str(there.fileno())]
        # This package may be importable only through this process's sys.path (a source tree, a notebook).
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(dict.fromkeys([root, *filter(None, sys.path)]))
        with there:
            child = subprocess.Popen(
                [*command, str(self._seconds), str(self._most_bytes), str(IDLE_SECONDS)],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process, which ends that one in its time
                env={
                    **os.environ,
                    "PYTHONPATH": path,
                    "TOKENIZERS_PARALLELISM": "false",
                    "OPENBLAS_NUM_THREADS": "1",
                },
            )
        self._running, self._owner = (child, here), os.getpid()
        return child, here


def _remedy(number: int) -> str:
    if number in _CRASHES:
        return "Its files make the library that reads them crash: do not use this model."
    return "Another program did that: try it again."


def _patience(seconds: float, step_seconds: float) -> float:
    """How long this process waits for a step, which the kernel ends mostly: before it a tokenizer may be read."""
    return _WAIT_TIMES * (seconds + step_seconds) + _START


def _answers(pipe: Connection, seconds: float) -> bool:
    """Whether something can be read within `seconds`, in which this process was not stopped: of each turn one counts,
    however long it was."""
    return any(pipe.poll(1.0) for _ in range(math.ceil(seconds)))


_process = functools.cache(_Process)
_numbers = itertools.count()


def bounded_call(function: Callable[..., _T], folder: Path, *arguments: Any) -> _T:
    """What a module's function returns of a folder of a tokenizer's files and the other arguments, run in the other
    process. Raises UserError as it does, and OutOfBoundsError."""
    number = next(_numbers)
    return _process(STEP_SECONDS, STEP_BYTES, "").call(number, folder, function, (folder, *arguments))  # type: ignore[no-any-return]


class BoundedTokenizer(HFTokenizer):
    """An HFTokenizer whose files are run in another process. Reading an answer, ids to text, happens here."""

    def __init__(
        self, folder: Path, seconds: float | None = None, most_bytes: int = STEP_BYTES, purpose: str = ""
    ) -> None:
        """`seconds` for a step (STEP_SECONDS, and BLOCK_SECONDS for a block of conversations or one of any length);
        tokenizers of another `purpose` are in another process, and do not wait for this one's steps. Raises UserError
        as HFTokenizer does, and OutOfBoundsError."""
        self._process = _process(STEP_SECONDS if seconds is None else seconds, most_bytes, purpose)
        self._block_seconds = BLOCK_SECONDS if seconds is None else seconds
        self._number, self.folder = next(_numbers), folder.absolute()
        raw, facts = self._call("facts")
        self.__dict__.update(facts | {"folder": folder})
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(raw)  # was read there within the bounds

    def _call(self, step: str, *arguments: Any) -> Any:
        assert self.folder is not None
        seconds = self._block_seconds if step in _BLOCK_STEPS else None
        return self._process.call(self._number, self.folder.absolute(), step, arguments, seconds)

    def close(self) -> None:
        self._process.close()

    def encode(self, text: str) -> list[int]:
        return self._call("encode", text)  # type: ignore[no-any-return]

    def prompt_ids(self, conversation: Conversation, thinking: bool | None = None) -> list[int]:
        return self._call("prompt_ids", conversation, thinking)  # type: ignore[no-any-return]

    def text_ids(self, text: str) -> list[int]:
        return self._call("text_ids", text)  # type: ignore[no-any-return]

    def tokenize(self, conversation: Conversation, every_answer: bool = False) -> list[TokenizedSample]:
        return self._call("tokenize", conversation, every_answer)  # type: ignore[no-any-return]

    def message_spans(self, conversation: Conversation) -> list[tuple[list[int], list[MessageSpan]]]:
        return self._call("message_spans", conversation)  # type: ignore[no-any-return]

    def render_valid(self, conversations: Sequence[Conversation]) -> tuple[RenderedBlock, dict[int, str]]:
        return self._call("render_valid", list(conversations))  # type: ignore[no-any-return]

    def check_trainable(self) -> None:
        self._call("check_trainable")


# --- The other process ----------------------------------------------------------------------------


def _answer(make: Any) -> tuple[str, Any]:
    try:
        return "value", make()
    except UserError as error:
        return "error", (error.message, error.remedy)
    except RefusalError as refusal:
        return "refused", str(refusal)
    except MemoryError:
        os._exit(_NO_MEMORY)
    except Exception as error:  # a fault of ours: it belongs to who asked
        return "failed", f"{type(error).__name__}: {error}"


def _serve(pipe: Connection, seconds: float, most_bytes: int, idle: float) -> None:
    """Steps until the other end is closed, or none comes for a while. The kernel ends this process when one takes too
    long, whatever runs: no handler is in the way, and no lock of the interpreter."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    opened = OrderedDict[int, HFTokenizer]()
    while True:
        try:
            if not pipe.poll(idle):
                return
            number, folder, step, arguments, own_seconds = pipe.recv()
        except (EOFError, ConnectionResetError):
            return

        def make() -> Any:
            signal.setitimer(signal.ITIMER_PROF, own_seconds if callable(step) else seconds)  # noqa: B023
            if callable(step):  # noqa: B023
                return step(*arguments)  # noqa: B023
            tokenizer = opened.pop(number, None) or HFTokenizer(folder)  # noqa: B023
            opened[number] = tokenizer  # noqa: B023
            while len(opened) > _OPENED:
                opened.popitem(last=False)
            signal.setitimer(signal.ITIMER_PROF, own_seconds)  # noqa: B023
            return getattr(tokenizer, step)(*arguments)  # noqa: B023

        block = step in _BLOCK_STEPS
        if block:  # as prepare's workers: nothing in it makes cycles
            gc.disable()
        _limit_memory(most_bytes * (_BLOCK_TIMES if block else 1))
        told = _answer(make)
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(told)
        del told, arguments
        gc.enable()
        if block and _addresses() > most_bytes // 2:  # what is left of the block is no fault of the next step's
            return


def _limit_memory(most_bytes: int) -> None:
    """Bytes of address space, and not more than whoever started this process has allowed it."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    own = most_bytes if hard == resource.RLIM_INFINITY else min(most_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (own, hard))


def _addresses() -> int:
    """Bytes of address space in use; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    return 0


def main() -> None:
    descriptor, seconds, most_bytes, idle = sys.argv[1:]
    _limit_memory(int(most_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ImportError):  # now rather than within a step's time; HFTokenizer says what is missing
        for name in ("jinja2.ext", "jinja2.sandbox", "tokenizers"):
            import_module(name)
    try:
        _serve(Connection(int(descriptor)), float(seconds), int(most_bytes), float(idle))
    except MemoryError:
        os._exit(_NO_MEMORY)
    os._exit(0)  # at once: whoever asks meanwhile waits for it


if __name__ == "__main__":
    main()
