"""The connection to a process on a node: noise, silence, an end with last words; and no process stays."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lumina.cluster.preflight.connection import NoAnswerError, NodeConnection

ECHO = """
import json, sys, time, signal
print("Welcome to node 7!", flush=True)
print(json.dumps({"id": 0, "host": "x"}), flush=True)
for line in sys.stdin:
    question = json.loads(line)
    if question["do"] == "die":
        print("first", file=sys.stderr); sys.exit("the reason")
    if question["do"] == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True: time.sleep(100)
    print("[1, 2]\\n7\\n{}", flush=True)
    print(json.dumps({"id": question["id"], "got": question["x"]}), flush=True)
"""


async def start(code: str) -> NodeConnection:
    pipe = asyncio.subprocess.PIPE
    return NodeConnection("x", await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    ))  # fmt: skip


def converse(code: str, *questions: tuple[str, float, dict[str, Any]], patience: float = 2.0) -> tuple[list[Any], int]:
    """The answers or errors, and the pid of the process, which must be gone."""

    async def exchange() -> tuple[list[Any], int]:
        line = await start(code)
        answers: list[Any] = []
        try:
            answers.append(await line.hello(60))
            for question in questions:
                answers.append(await line.ask(*question))
        except NoAnswerError as error:
            answers.append(str(error))
        finally:
            await line.close(patience)
        return answers, line._process.pid

    answers, pid = asyncio.run(exchange())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    return answers, pid


def test_answers_come_through_noise() -> None:
    answers, _ = converse(ECHO, ("echo", 60, {"x": "a, 'b'\n\n"}), ("echo", 60, {"x": [1]}))
    assert answers == [{"host": "x"}, {"got": "a, 'b'\n\n"}, {"got": [1]}]


def test_an_end_is_told_with_its_last_words() -> None:
    assert converse(ECHO, ("die", 60, {}))[0][1:] == ["the reason"]
    assert converse("import sys; sys.exit(3)")[0] == ["ended with exit code 3, saying nothing"]


def test_silence_ends_in_time_and_the_process_too() -> None:
    answers, _ = converse(ECHO, ("hang", 0.3, {}), patience=0.1)
    assert answers[1:] == ["no answer to “hang” within 0.3 s"]


def test_a_command_that_cannot_be_asked(tmp_path: Path) -> None:
    """The process ends while it is asked something large."""
    answers, _ = converse("print('{\"id\": 0}', flush=True); import os; os.close(0)", ("x", 60, {"y": "z" * 10**6}))
    assert answers[1:] == ["ended with exit code 0, saying nothing"]
