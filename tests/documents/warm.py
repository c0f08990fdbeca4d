"""A server that has imported what commands import, and forks a process for each: seconds of a processor less a command.

`WarmServer` starts it. It puts a `lumina` into a folder that goes to the front of PATH, and runs Python scripts. What
runs has the caller's arguments, folder, environment and descriptors, its own process, and the caller's signals; the
caller ends with its exit code. Only the imports are not its own: what starts Python itself (`deepspeed`, `mpirun`, the
ranks of `lumina launch`) does not come here.

The server's standard input is a pipe that nobody writes to. Its other end closes with the process that started the
server, however that ends: then the server, the processes that it forked and its folder go too.

All of it is on the CPU: a process that has asked CUDA for devices cannot be forked into one that uses them.
"""

from __future__ import annotations

import array
import atexit
import gc
import io
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

CLIENT = Path(__file__).with_name("warm_client.py")
PRELOADED = "tests.documents.preload"
ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": ""}


class WarmServer:
    """Started when it is made; ends when it is left as a context, or with this process, and so does what it still runs.
    preload: the module that it imports for all."""

    def __init__(self, preload: str = PRELOADED) -> None:
        self._place = Path(tempfile.mkdtemp(prefix="lumina-warm-"))  # a socket's path has 107 bytes
        self.socket = self._place / "socket"
        self.bin = self._place / "bin"
        self.bin.mkdir()
        command = self.bin / "lumina"
        command.write_text(f'#!/bin/sh\nexec {" ".join(map(_quoted, self.lumina()))} "$@"\n')
        command.chmod(0o755)
        ready, told = os.pipe()
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.documents.warm", str(self.socket), str(told), preload],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **ON_THE_CPU},
            stdin=subprocess.PIPE,
            pass_fds=[told],
            start_new_session=True,  # Ctrl-C is for the caller
        )
        os.close(told)
        with os.fdopen(ready) as words:
            assert words.read() == "ready", "the warm server has not started"

    def __enter__(self) -> WarmServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def seconds(self) -> float:
        """Of the processors, of what has run."""
        times = Path(f"{self.socket}.seconds")
        return sum(map(float, times.read_text().split())) if times.exists() else 0.0

    def lumina(self) -> list[str]:
        return [sys.executable, "-IS", str(CLIENT), str(self.socket), "lumina"]

    def python(self, script: Path) -> list[str]:
        """The command that runs a script."""
        return [sys.executable, "-IS", str(CLIENT), str(self.socket), "python", str(script)]


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


# --- The server's processes -----------------------------------------------------------------------

_STARTER = 0  # the pipe from what started the server: readable when that has ended


def serve(path: str, ready: int) -> dict[str, Any]:
    """Returns in each process that is to run something, with what; the server itself does not return."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a guard
    os.write(ready, b"ready")
    os.close(ready)
    while _STARTER not in select.select([listener, _STARTER], [], [])[0]:
        caller, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return _guarded(caller, path)
        caller.close()
    with suppress(ChildProcessError):
        os.wait()  # for all guards, which have read the same, since their ends are ignored
    shutil.rmtree(Path(path).parent, ignore_errors=True)
    os._exit(0)


def _guarded(caller: socket.socket, path: str) -> dict[str, Any]:
    """Fork the process that runs what the caller asks for. This one passes its signals on, and its exit code back."""
    text, early, descriptors = _received(caller)
    begun, told = os.pipe()
    task = os.fork()
    if task == 0:
        os.setsid()
        for own in (begun, told, caller.detach()):
            os.close(own)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        # Anew: the server's own know what kind of files they were made for.
        files = (io.FileIO(number, "r" if number == 0 else "w", closefd=False) for number in range(3))
        sys.stdin = io.TextIOWrapper(io.BufferedReader(next(files)), "utf-8")
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(next(files)), "utf-8")
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(next(files)), "utf-8", "backslashreplace", line_buffering=True)
        request: dict[str, Any] = json.loads(text)
        return request
    for descriptor in (told, *descriptors):
        os.close(descriptor)
    os.read(begun, 1)  # nothing: the task has its own process group, which signals go to
    code, seconds = _relayed(task, caller, early)
    with open(f"{path}.seconds", "a", encoding="utf-8") as file:
        file.write(f"{seconds}\n")
    with suppress(OSError):  # the caller is gone
        caller.sendall(str(code).encode())
    os._exit(0)


def _received(caller: socket.socket) -> tuple[bytes, bytes, array.array[int]]:
    """A caller's request, the signals that it sent right behind, and its descriptors."""
    descriptors = array.array("i")
    words, ancillary, *_ = caller.recvmsg(1 << 20, socket.CMSG_SPACE(3 * descriptors.itemsize))
    for _level, _kind, data in ancillary:
        descriptors.frombytes(data)
    head, _, text = words.partition(b"\n")
    length = int(head or b"1")
    while len(text) < length:
        more = caller.recv(1 << 20)
        if not more:
            os._exit(0)  # the caller is gone
        text += more
    return text[:length], text[length:], descriptors


def _relayed(task: int, caller: socket.socket, numbers: bytes) -> tuple[int, float]:
    """Pass signals on, `numbers` first, until the task ends; it is killed when the caller is gone, or what started the
    server. Returns the task's exit code and the seconds of the processors that it took."""
    ended, killed = os.pidfd_open(task), False
    while True:
        for number in numbers:
            os.killpg(task, number)
        readable = select.select([ended, *([] if killed else [caller, _STARTER])], [], [])[0]
        if ended in readable:
            break
        numbers = b"" if _STARTER in readable else caller.recv(64)
        if not numbers:
            numbers, killed = bytes([signal.SIGKILL]), True
    _, status, used = os.wait4(task, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def main() -> None:
    path, ready = sys.argv[1], int(sys.argv[2])
    __import__(sys.argv[3])
    gc.freeze()
    request = serve(path, ready)
    try:
        _run(request)
        code = 0
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # As the interpreter ends, but for freeing what was imported, which would copy each of its pages.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _run(request: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    program, *words = request["arguments"]
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parents[2])]
    if program == "lumina":
        from lumina.cli import main as lumina

        sys.argv = ["lumina", *words]
        sys.exit(lumina())
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
