"""Bounds of a tokenizer's process: what counts against them. tests/adversary/test_model_files.py has what they hold."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from lumina.chat import Conversation, Message, bounded_call
from lumina.chat.hf.bounded import BoundedTokenizer, OutOfBoundsError, ProcessEndedError
from lumina.config import UserError
from tests.chat.hf.steps import end_here, stop_here
from tests.small_tokenizer import CHATML, write_tokenizer

MEMORY = "'x' * (80000000 * (messages[0]['content'] | length))"
LARGE = "{% if messages[0]['content'] == 'large' %}{% set s = " + MEMORY + " %}{% endif %}"


def stopped_children() -> list[int]:
    found = []
    for child in psutil.Process().children():
        try:
            found += [child.pid] if child.status() == psutil.STATUS_STOPPED else []
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_process_that_was_stopped_is_no_fault_of_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than a step may take. Its time is that of a processor."""
    seconds = 0.4
    monkeypatch.setattr("lumina.chat.hf.bounded.STEP_SECONDS", seconds)
    made: list[str] = []
    step = threading.Thread(target=lambda: made.append(bounded_call(stop_here, tmp_path)))
    step.start()
    while not (stopped := stopped_children()):
        assert step.is_alive()
        time.sleep(0.01)
    time.sleep(2 * seconds)
    os.kill(stopped[0], signal.SIGCONT)
    step.join()
    assert made == [tmp_path.name]


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGSEGV, "ended by SIGSEGV\n  Its files make the library that reads them crash"),
        pytest.param(signal.SIGTERM, "ended by SIGTERM\n  Another program did that", marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, "takes more than 4096 MiB of memory", marks=pytest.mark.long),
    ],
)
def test_a_process_that_was_ended_is_told_as_it_was(number: signal.Signals, says: str, tmp_path: Path) -> None:
    """Only SIGKILL, which a kernel without memory sends, and the step's own bound are memory."""
    with pytest.raises(OutOfBoundsError) as raised:
        bounded_call(end_here, tmp_path, int(number))
    assert isinstance(raised.value, ProcessEndedError) is (number != signal.SIGKILL)
    assert says in str(raised.value)


@pytest.mark.long  # 400 MB of memory, several times
def test_a_conversation_of_any_length_may_take_more_memory(tmp_path: Path) -> None:
    """As a block of data may: what `prepare` takes, `evaluate` does."""
    asked = [Message("user", "large")]
    whole = Conversation([*asked, Message("assistant", "b")])
    folder = write_tokenizer(tmp_path / "tokenizer", LARGE + CHATML)
    bounded = BoundedTokenizer(folder, most_bytes=448 << 20)
    with pytest.raises(UserError, match="MemoryError"):
        bounded.prompt_ids(Conversation(asked))
    (ids, _), *more = bounded.message_spans(whole)
    assert not more
    assert bounded.decode(ids).count("large") == 1
    bounded.close()
