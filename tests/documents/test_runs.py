"""The documents' command blocks run as they stand."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.documents.blocks import ROOT, blocks, documents
from tests.documents.runs import BlockError, Runs, answers
from tests.documents.warm import WarmServer
from tests.documents.workplace import environment, make

WITH_COMMANDS = [document for document in documents() if blocks(document)]


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmServer]:
    with WarmServer() as server:
        yield server


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory, warm: WarmServer) -> Iterator[Path]:
    folder = make(tmp_path_factory.mktemp("documents") / "sample", warm)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("document", WITH_COMMANDS, ids=lambda document: document.name)
def test_the_blocks_of(document: Path, sample: Path, warm: WarmServer, place: Path) -> None:
    read = blocks(document)
    for address in {block.serves for block in read if block.serves}:
        if answers(address):
            pytest.skip(f"another program answers at {address}")
    folder = shutil.copytree(sample, place / "work", symlinks=True)
    with Runs(folder, print, warm) as runs:
        for block in read:
            runs.run(block)
    assert runs.run_blocks + runs.skipped_blocks == len(read)


def test_the_warm_server_stands_for_the_command(sample: Path, warm: WarmServer, tmp_path: Path) -> None:
    """Arguments, folder, environment, descriptors, exit code and signals are those of a process of one's own."""
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nprint(sys.argv[1:], os.getcwd(), os.environ['HERE'], input())\nsys.exit(3)\n")
    options: dict[str, Any] = {"env": {**environment(sample, warm), "HERE": "x"}, "cwd": tmp_path, "text": True}
    done = subprocess.run([*warm.python(script), "a b"], input="said\n", capture_output=True, **options, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"['a b'] {tmp_path} x said\n", "")
    script.write_text("1 / 0\n")
    failed = subprocess.run(warm.python(script), capture_output=True, **options, check=False)
    assert failed.returncode == 1
    assert failed.stderr.endswith("ZeroDivisionError: division by zero\n")
    refused = subprocess.run(["bash", "-c", "lumina nope"], capture_output=True, **options, check=False)
    assert (refused.returncode, refused.stderr.splitlines()[0]) == (2, "error: no such command: nope.")
    script.write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)\n")
    for number in (signal.SIGTERM, signal.SIGKILL):
        with subprocess.Popen(warm.python(script), stdout=subprocess.PIPE, **options) as waiting:
            assert waiting.stdout is not None
            assert waiting.stdout.readline() == "begun\n"
            waiting.send_signal(number)
            assert waiting.stdout.read() == "", "what it stood for has ended, which held the pipe"
        assert waiting.returncode == -number


def test_a_signal_that_comes_with_the_request(tmp_path: Path) -> None:
    """The process that it is for is not there yet."""
    script = tmp_path / "script.py"
    script.write_text("import time\ntime.sleep(600)\n")
    request = {"arguments": ["python", str(script)], "folder": str(tmp_path), "environment": dict(os.environ)}
    text = json.dumps(request).encode()
    with WarmServer("json") as server, socket.socket(socket.AF_UNIX) as caller, open(os.devnull, "r+b") as null:
        caller.settimeout(200)
        caller.connect(str(server.socket))
        socket.send_fds(caller, [b"%d\n" % len(text), text, bytes([signal.SIGTERM])], [null.fileno()] * 3)
        assert caller.recv(64) == b"%d" % -signal.SIGTERM


STARTER = """
import subprocess, sys
from pathlib import Path
from tests.documents.warm import WarmServer

subprocess.run(WarmServer("json").python(Path(sys.argv[1])))
"""


def test_nothing_outlives_what_started_the_warm_server(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    command = [sys.executable, "-c", STARTER, str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "0"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as starter:
        assert starter.stdout is not None
        task = psutil.Process(int(starter.stdout.readline()))
        guard, server, above = task.parents()[:3]
        assert above.pid == starter.pid
        folder = Path(server.cmdline()[4]).parent
        assert (folder / "bin" / "lumina").exists()
        assert server.environ()["CUDA_VISIBLE_DEVICES"] == ""
        left = [(one, os.pidfd_open(one.pid)) for one in (task, guard, server)]
        starter.kill()
        try:
            for one, ended in left:
                assert select.select([ended], [], [], 200)[0], f"still runs: {one}"
        finally:
            for one, ended in left:
                os.close(ended)
                if one.is_running():
                    one.kill()
    assert not folder.exists()


def written(folder: Path, *lines: str) -> Path:
    document = folder / "page.md"
    document.write_text("\n".join(lines) + "\n")
    return document


def test_a_failing_command_is_named_by_document_and_line(tmp_path: Path) -> None:
    document = written(tmp_path, "# Page", "", "```bash", "true", "echo said", "false", "echo never", "```")
    (block,) = blocks(document)
    with Runs(tmp_path, print) as runs, pytest.raises(BlockError) as failed:
        runs.run(block)
    assert str(failed.value).startswith(f"{document}:6: exit code 1\n")
    assert "said" in str(failed.value)
    assert "\nnever" not in str(failed.value)


def test_a_failing_python_block_has_the_documents_lines(tmp_path: Path) -> None:
    page = ["```python", "a = 1", "```", "", "<!-- goes on -->", "```python", "print(a)", "print(1 / (a - 1))", "```"]
    first, second = blocks(written(tmp_path, *page))
    with Runs(tmp_path, print) as runs:
        runs.run(first)
        with pytest.raises(BlockError) as failed:
            runs.run(second)
    assert "line 8, in <module>" in str(failed.value)
    assert "ZeroDivisionError" in str(failed.value)


def test_marks_say_what_is_not_run(tmp_path: Path) -> None:
    document = written(
        tmp_path,
        "<!-- not run (exit 1): it would end here -->",
        "<!-- run with small for large: shorter -->",
        "```bash",
        "echo large > large.txt",
        "exit 1 \\",
        "  2",
        "exit 11 > eleven || true",
        "```",
        "<!-- not run: never -->",
        "```bash",
        "false",
        "```",
    )
    first, second = blocks(document)
    assert first.script().splitlines() == ["echo small > small.txt", "# exit 1 \\", "#   2", "exit 11 > eleven || true"]
    said: list[str] = []
    with Runs(tmp_path, said.append) as runs:
        runs.run(second)
    assert (runs.run_blocks, runs.skipped_blocks) == (0, 1)
    assert said == [f"{document}:10 not run: never"]
    assert first.notes() == ["not run: exit 1 …: it would end here", "run with small for large: shorter"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["```", "lumina runs", "```"], "without a language"),
        (["```bash", "lumina runs"], "not closed"),
        (["    lumina runs"], "no fence opens"),
        (["<!-- notrun: typed wrongly -->", "```bash", "lumina runs", "```"], "no mark of a block"),
        (["<!-- not run: minutes -->", "", "```bash", "lumina runs", "```"], "no block right below"),
    ],
)
def test_no_command_slips_past(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blocks(written(tmp_path, *lines))


@pytest.mark.parametrize("mark", ["not run (lumina chat): gone", "run with a for b: gone"])
def test_a_mark_without_its_command_is_an_error(tmp_path: Path, mark: str) -> None:
    (block,) = blocks(written(tmp_path, f"<!-- {mark} -->", "```bash", "lumina runs", "```"))
    with pytest.raises(ValueError, match="the mark's"):
        block.script()
