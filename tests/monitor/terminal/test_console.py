"""The console line is the early README's, word for word in form."""

from __future__ import annotations

import io
import math
import re
import sys

import pytest

from lumina.monitor import Console, HealthStatus, line
from lumina.monitor.terminal import console as room
from tests.monitor.recorded import step_record

# The early README, its two lines joined.
EARLY_LINE = (
    "Epoch 1 | Step    150 | Batch  150/2000 | Loss: 2.456789 | PPL: 11.67 | LR: 8.50e-05 | GradNorm: 0.8432 | "
    "Tokens/s: 1250 | GPU: 8.2GB/16.0GB | Health: OK"
)


def test_the_seeds_line() -> None:
    assert line(step_record()) == EARLY_LINE


def test_on_a_cpu() -> None:
    assert line(step_record(memory_kind="Mem")) == EARLY_LINE.replace("GPU:", "Mem:")


def test_large_and_small_figures_keep_the_form() -> None:
    found = line(step_record(step=1_234_567, batch=7, batches=90, epoch=12, loss=0.0, lr=1e-4, grad_norm=123.45678))
    assert found.startswith("Epoch 12 | Step 1234567 | Batch    7/90 | Loss: 0.000000 | PPL: 1.00 | LR: 1.00e-04 | ")
    assert "GradNorm: 123.4568 |" in found


def test_a_loss_that_is_not_finite_is_shown() -> None:
    found = line(step_record(loss=math.nan, grad_norm=math.inf, health=HealthStatus("crit", "loss is not finite")))
    assert "| Loss: nan | PPL: nan |" in found
    assert "| GradNorm: inf |" in found
    assert found.endswith("| Health: CRIT(loss is not finite)")


def test_perplexity_overflows_to_infinity() -> None:
    assert step_record(loss=699.0).ppl == math.exp(699.0)
    assert step_record(loss=800.0).ppl == math.inf


def test_a_long_evaluation_gives_signs_of_life(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line from three seconds on, then every ten; the next evaluation counts anew, and a short one is mute."""
    seconds = 0.0
    monkeypatch.setattr(room.time, "monotonic", lambda: seconds)
    with Console(True, total_steps=6, start_step=0) as console:
        for each in (1.0, 0.1):
            for done in range(1, 21):
                seconds += each
                console.progress("Evaluating", done, 20)
    assert capsys.readouterr().out.splitlines() == ["Evaluating 4/20", "Evaluating 14/20"]


def test_bytes_in_a_larger_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the live view. What is done and what there is are equal when all is done, however they are rounded."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    for done, total, shown in (
        (12_000_000, 340_100_000, "Preparing 12/341 MB"),
        (1_499_999, 1_500_000, "Preparing 1/2 MB"),
        (1_999_999, 2_000_000, "Preparing 1/2 MB"),
        (999, 1_000, "Preparing 0/1 MB"),
        (1_500_000, 1_500_000, ""),
        (1_000, 1_000, ""),
        (0, 0, ""),
    ):
        out = io.StringIO()
        monkeypatch.setattr(sys, "stdout", out)
        with Console(True, 0, 0) as console:
            assert console.live
            console.progress("Preparing", 0, 10**6, " MB", 10**6)
            console.progress("Preparing", done, total, " MB", 10**6)
        last = out.getvalue().rpartition("╭")[2]
        assert re.findall(r"Preparing \d+/\d+ MB", last) == ([shown] if shown else []), out.getvalue()


def test_what_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last step, the unhealthy ones, and otherwise one line a second; never marked up or wrapped."""
    clock = iter([10.0, 10.2, 10.4, 10.9, 11.3, 11.4])
    monkeypatch.setattr(room.time, "monotonic", lambda: next(clock))
    with Console(True, total_steps=6, start_step=0) as console:
        for step in range(1, 7):
            console.step(step_record(step=step, health=HealthStatus("warn", "x") if step == 3 else HealthStatus()))
        console.say("[bold]as it is[/bold] " + "x" * 300)
    printed = capsys.readouterr().out.splitlines()
    # 1: first; 3: unhealthy; 5: 0.9 s after 3 is too soon; 6: last. Step 4 comes 0.5 s after 3.
    assert [text.split("|")[1].split()[1] for text in printed[:-1]] == ["1", "3", "6"]
    assert printed[0] == line(step_record(step=1))
    assert printed[-1] == "[bold]as it is[/bold] " + "x" * 300


def test_a_line_a_second(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 11.0, 11.5, 12.1])
    monkeypatch.setattr(room.time, "monotonic", lambda: next(clock))
    with Console(True, total_steps=100, start_step=10) as console:
        for step in range(11, 16):
            console.step(step_record(step=step))
    printed = capsys.readouterr().out.splitlines()
    assert [int(text.split("|")[1].split()[1]) for text in printed] == [11, 13, 15]


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(False, total_steps=1, start_step=0) as console:
        console.step(step_record(step=1))
        console.say("anything")
    assert capsys.readouterr().out == ""
