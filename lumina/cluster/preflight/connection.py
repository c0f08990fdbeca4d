"""Connection to a process on a node: questions out, answers back, JSON lines over one ssh (or a pipe here)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lumina.cluster.hostfile import Host
from lumina.cluster.transport import RemoteModule, choose, launcher_environment, remote_command

_LONGEST_LINE = 2**24  # bytes
_GOODBYE = 2.0  # seconds in which a process may end by itself
_READING = 1.0  # seconds for the last words of a process that has ended


class NoAnswerError(Exception):
    """The probe has ended, or has not answered in time; the message has the last line that it wrote."""


class NodeConnection:
    """Connection to the probe on one node, for one task at a time: an answer belongs to the last question."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        self._number = 0
        self._words: deque[str] = deque(maxlen=20)
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def open(cls, host: Host, module: str, folder: str) -> NodeConnection:
        """Start `python -m MODULE -` on the host, in the folder. Does not wait for it."""
        command = remote_command(choose("auto", host), host, RemoteModule(module, folder))
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=folder,
            env=launcher_environment(),
            limit=_LONGEST_LINE,
            start_new_session=True,
        )
        return cls(host.name, process)

    async def _listen(self) -> None:
        """Keep the last words on its standard error."""
        assert self._process.stderr is not None
        with suppress(ValueError):  # a line beyond all bounds
            async for line in self._process.stderr:
                if text := line.decode(errors="replace").strip():
                    self._words.append(text)

    async def hello(self, patience: float) -> dict[str, Any]:
        """The first line of the other side. Raises NoAnswerError."""
        return await self._answer(0, "the command that ssh was given", patience)

    async def ask(self, do: str, patience: float, values: Mapping[str, Any]) -> dict[str, Any]:
        """The answer, within `patience` seconds. Raises NoAnswerError."""
        assert self._process.stdin is not None
        self._number += 1
        self._process.stdin.write(json.dumps({"id": self._number, "do": do, **values}).encode() + b"\n")
        return await self._answer(self._number, f"“{do}”", patience)

    async def _answer(self, number: int, what: str, patience: float) -> dict[str, Any]:
        try:
            return await asyncio.wait_for(self._read(number), max(0.0, patience))
        except TimeoutError:
            raise NoAnswerError(f"no answer to {what} within {max(0.0, patience):.3g} s") from None

    async def _read(self, number: int) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            try:
                answer = json.loads(line)
            except ValueError:  # what a login script prints
                continue
            if isinstance(answer, dict) and answer.pop("id", None) == number:
                return answer
        await self._process.wait()
        await asyncio.wait([self._listening], timeout=_READING)
        raise NoAnswerError(self._last_words())

    def _last_words(self) -> str:
        # ssh's own, such as "Warning: Permanently added …": not why it ended. For people; nothing is decided by it.
        words = [word for word in self._words if not word.startswith("Warning:")]
        # The last line of a traceback, or of ssh, says most; a shell's complaint may come before others.
        return words[-1] if words else f"ended with exit code {self._process.returncode}, saying nothing"

    async def close(self, patience: float = _GOODBYE) -> None:
        """End the process here, by force after `patience` seconds; the one there ends with its input."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), patience)
        except TimeoutError:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._listening.cancel()
        await self._process.wait()
