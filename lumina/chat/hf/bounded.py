"""An imported model's tokenizer in a process of its own, in which each step has bounds of time and memory.

A tokenizer.json and a chat template come with a model, from whoever made it, and are programs: a template has loops, a
normalizer replaces by regular expressions. Jinja's sandbox and tokenizers keep them from touching anything else, and
neither bounds what they cost. So they are run in another process, which the kernel ends when a step takes too long; the
next step begins a new one. What stays in this process is ids to text, over a decoder that was checked (escaping.py).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from lumina.chat.conversation import Conversation
from lumina.chat.hf.jinja import RefusalError
from lumina.chat.hf.tokenizer import HFTokenizer, TokenizedSample
from lumina.chat.protocol import MessageSpan, RenderedBlock
from lumina.config import UserError

STEP_SECONDS = 20.0  # for a step, and for reading the files
STEP_BYTES = 4 << 30  # of address space; the largest vocabularies take a third of it
_LATE, _START = 2.0, 60.0  # seconds after which this process ends the other itself; for it to start
_OPENED = 4  # tokenizers that are kept; one more costs reading its files again
_NO_MEMORY = 3  # exit code


class OutOfBoundsError(UserError):
    """A step that took more time or memory than it may."""


class _Process:
    """The other process, started with the first step, for all tokenizers of these bounds. Steps are made one at a time.
    It ends with this process, when it reads that nobody is there any more."""

    def __init__(self, seconds: float, most_bytes: int) -> None:
        self._seconds, self._most_bytes = seconds, most_bytes
        self._lock = threading.Lock()
        self._running: tuple[subprocess.Popen[bytes], Connection] | None = None

    def call(self, number: int, folder: Path, step: str, *arguments: Any) -> Any:
        """What the method `step` of tokenizer `number` returns, which is opened from its folder where it is not yet.
        Raises UserError and RefusalError as it does, and OutOfBoundsError."""
        kind: str
        value: Any = None
        with self._lock:
            fresh = self._running is None
            if fresh:
                self._start()
            assert self._running is not None
            child, pipe = self._running
            try:
                pipe.send((number, folder, step, arguments))
                late = not pipe.poll(2 * self._seconds + _LATE + (_START if fresh else 0.0))
                kind, value = ("late", value) if late else pipe.recv()
            except (EOFError, OSError):
                kind = "died"
            except BaseException:  # Ctrl-C: the answer that comes later is not the next step's
                self.close()
                raise
            if kind in ("late", "died"):
                self.close()
                child.wait()
        if kind == "value":
            return value
        if kind == "refused":
            raise RefusalError(value)
        if kind == "error":
            raise UserError(*value)
        if kind == "failed":
            raise RuntimeError(value)
        if child.returncode > 0 and child.returncode != _NO_MEMORY:
            raise RuntimeError(f"the process of {folder}'s tokenizer ended with exit code {child.returncode}")
        took_time = kind == "late" or child.returncode == -signal.SIGALRM
        what = f"more than {self._seconds:g} s" if took_time else f"more than {self._most_bytes >> 20} MiB of memory"
        raise OutOfBoundsError(
            f"{folder}: its tokenizer or chat template takes {what} for one step",
            "Its files do not do what a tokenizer does: do not use this model.",
        )

    def close(self) -> None:
        """End the process, and with it the step that is being made."""
        running, self._running = self._running, None
        if running is not None:
            running[0].kill()
            running[0].wait()

    def _start(self) -> None:
        here, there = Pipe()
        command = [sys.executable, "-P", "-m", __name__, str(there.fileno())]
        with there:
            child = subprocess.Popen(
                [*command, str(self._seconds), str(self._most_bytes)],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process, which ends that one in its time
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"},
            )
        self._running = child, here


_process = functools.cache(_Process)
_numbers = itertools.count()


class BoundedTokenizer(HFTokenizer):
    """An HFTokenizer whose files are run in another process. Reading an answer, ids to text, happens here."""

    def __init__(self, folder: Path, seconds: float = STEP_SECONDS, most_bytes: int = STEP_BYTES) -> None:
        """Raises UserError as HFTokenizer does, and OutOfBoundsError."""
        self._process, self._number, self.folder = _process(seconds, most_bytes), next(_numbers), folder.absolute()
        raw, facts = self._call("facts")
        self.__dict__.update(facts | {"folder": folder})
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(raw)  # was read there within the bounds

    def _call(self, step: str, *arguments: Any) -> Any:
        assert self.folder is not None
        return self._process.call(self._number, self.folder.absolute(), step, *arguments)

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


def _serve(pipe: Connection, seconds: float) -> None:
    """Steps until the other end is closed. The kernel ends this process when one takes too long, whatever runs: no
    handler is in the way, and no lock of the interpreter."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    opened = OrderedDict[int, HFTokenizer]()
    while True:
        try:
            number, folder, step, arguments = pipe.recv()
        except EOFError:
            return

        def make() -> Any:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            tokenizer = opened.pop(number, None) or HFTokenizer(folder)  # noqa: B023
            opened[number] = tokenizer  # noqa: B023
            while len(opened) > _OPENED:
                opened.popitem(last=False)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return getattr(tokenizer, step)(*arguments)  # noqa: B023

        told = _answer(make)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(told)


def main() -> None:
    descriptor, seconds, most_bytes = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (int(most_bytes), int(most_bytes)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ImportError):  # now rather than within a step's time; HFTokenizer says what is missing
        for name in ("jinja2.ext", "jinja2.sandbox", "tokenizers"):
            import_module(name)
    try:
        _serve(Connection(int(descriptor)), float(seconds))
    except MemoryError:
        os._exit(_NO_MEMORY)


if __name__ == "__main__":
    main()
