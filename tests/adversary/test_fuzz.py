"""A few texts at each door, and all that was ever found there; `make fuzz` tries for half an hour."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.adversary.doors import CORPUS, DOORS
from tests.adversary.fuzz import attempt, texts

#: Doors whose readers take longer for a text: fewer of them here.
FEW = {"tokenizer": 4, "template": 4, "ds_config": 10, "safetensors": 10}
KEPT = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.mark.parametrize("name", DOORS)
def test_a_door_reads_or_refuses(name: str) -> None:
    door = DOORS[name]
    for text in door.seeds():
        assert attempt(door, text) is None

    @settings(
        max_examples=FEW.get(name, 25),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(text=texts(door))
    def check(text: bytes) -> None:
        wrong = attempt(door, text)
        assert wrong is None, wrong

    check()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_is_found_no_more(path: Path) -> None:
    wrong = attempt(DOORS[path.parent.name], path.read_bytes())
    assert wrong is None, wrong


def test_no_test_has_a_time_for_its_examples() -> None:
    assert settings(max_examples=1).deadline is None
    assert HealthCheck.too_slow in settings().suppress_health_check


DRAWN: dict[str, tuple[float, float]] = {}


@pytest.mark.parametrize("order", ["first", "second"])
def test_draws_are_the_same_whatever_was_drawn_before(order: str) -> None:
    DRAWN[order] = (float(torch.rand(())), random.random())
    assert len(set(DRAWN.values())) == 1


def test_the_fuzzer_finds(tmp_path: Path) -> None:
    from tests.adversary.doors import Door

    def read(text: bytes, folder: Path) -> None:
        if b"\x00" in text:
            raise IndexError("planted")

    found = []

    @settings(max_examples=200, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(text=texts(Door(read, lambda: [b"abc"], (b"\0",))))
    def check(text: bytes) -> None:
        wrong = attempt(Door(read, lambda: [b"abc"]), text)
        if wrong is not None:
            found.append(wrong)

    check()
    assert found
    assert "IndexError: planted" in found[0]


class StillReadingError(BaseException):
    """What no reader takes for an error of the text."""


def test_a_template_runs_in_the_fuzzers_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds of commands would end it, and hide what it does: the fuzzer's process is watched."""
    monkeypatch.setattr("lumina.chat.hf.bounded.STEP_SECONDS", 0.25)

    def stop(*_: Any) -> None:
        raise StillReadingError

    assert attempt(DOORS["template"], DOORS["template"].seeds()[0]) is None  # and all is imported
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 0.5)  # of this process's own work
    try:
        with pytest.raises(StillReadingError):
            attempt(
                DOORS["template"], b"{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
            )
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)
