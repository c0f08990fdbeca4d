"""Runs a document's blocks in their order; the first that fails ends it, with the document and the line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from tests.documents.blocks import Block
from tests.documents.warm import WarmServer
from tests.documents.workplace import environment

LIMIT = 900.0  # seconds for a block
ANSWERS = 240.0  # seconds until a server answers

# The first line of each script, so that bash's line number n is the document's line: fence + n - 1.
_BASH = "set -eEo pipefail; trap 'echo \"bash: line $LINENO\" >&2' ERR\n"


class BlockError(Exception):
    """A block's command ended with another code than 0: document and line, then what was printed."""


class Runs:
    """What runs in one folder for one document, servers included, which end with it."""

    def __init__(self, folder: Path, say: Callable[[str], None], warm: WarmServer | None = None) -> None:
        self.folder, self.say, self._warm = folder, say, warm
        self.run_blocks = self.skipped_blocks = 0
        self._environment = environment(folder, warm)
        self._servers: list[subprocess.Popen[str]] = []
        self._python = ""

    def __enter__(self) -> Runs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            _end(server)

    def run(self, block: Block) -> None:
        """Raises BlockError."""
        for note in block.notes():
            self.say(f"{block.place} {note}")
        if block.skipped:
            self.skipped_blocks += 1
            return
        self.run_blocks += 1
        command = self._command(block)
        started = time.monotonic()
        if block.serves:
            self._serve(block, command)
        else:
            self._wait(block, command)
        self.say(f"{block.place} ran in {time.monotonic() - started:.1f} s")

    def _command(self, block: Block) -> list[str]:
        script = self.folder / f".block.{'py' if block.language == 'python' else 'sh'}"
        if block.language == "python":
            # Blank lines before it: Python's line numbers are the document's.
            before = self._python if block.goes_on else ""
            self._python = before + "\n" * (block.line - before.count("\n")) + block.script()
            script.write_text(self._python, encoding="utf-8")
            return [sys.executable, str(script)] if self._warm is None else self._warm.python(script)
        script.write_text(_BASH + block.script(), encoding="utf-8")
        return ["bash", str(script)]

    def _start(self, command: list[str], log: Path) -> subprocess.Popen[str]:
        with log.open("w") as file:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def _wait(self, block: Block, command: list[str]) -> None:
        log = self.folder / ".block.log"
        process = self._start(command, log)
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        if code != 0:
            raise BlockError(_story(block, log, "still runs" if code is None else f"exit code {code}"))

    def _serve(self, block: Block, command: list[str]) -> None:
        """Start it, and wait until its address answers."""
        if answers(block.serves):
            raise BlockError(f"{block.place}: something else answers at {block.serves}")
        log = self.folder / f".server-{len(self._servers)}.log"
        process = self._start(command, log)
        self._servers.append(process)
        deadline = time.monotonic() + ANSWERS
        while not answers(block.serves):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BlockError(_story(block, log, f"nothing answers at {block.serves}"))
            time.sleep(0.1)


def _end(process: subprocess.Popen[str]) -> None:
    """End a script and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(20)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def answers(address: str) -> bool:
    """Whether something serves HTTP there, whatever it says."""
    parts = urlsplit(address)
    try:
        with urllib.request.urlopen(f"{parts.scheme}://{parts.netloc}/", timeout=20):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _story(block: Block, log: Path, what: str) -> str:
    printed = log.read_text(errors="replace")
    lines = [int(number) for number in re.findall(r"^bash: line (\d+)$", printed, re.MULTILINE)]
    line = block.line + lines[-1] - 1 if lines else block.line
    return f"{block.place.rpartition(':')[0]}:{line}: {what}\n{block.script()}---\n{printed[-6000:]}"
