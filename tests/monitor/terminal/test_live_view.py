"""The live view: curves dot by dot, bounded memory, and a real run in a real terminal (tmux)."""

from __future__ import annotations

import io
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from lumina.monitor.events import Event
from lumina.monitor.terminal.braille import plot
from lumina.monitor.terminal.live_view import Curve, LiveView
from tests.monitor.recorded import step_record
from tests.runs import Runs, arguments, clean_environment, write_conversations

DOTS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))  # of bits 0 to 7, as Unicode names them


def dots(lines: list[str], margin: int) -> set[tuple[int, int]]:
    """(column, row) of every dot in drawn lines, by Unicode's own numbering of braille dots."""
    found = set()
    for y, text in enumerate(lines):
        for x, character in enumerate(text[margin:]):
            bits = ord(character) - 0x2800 if character != " " else 0
            found |= {(2 * x + dx, 4 * y + dy) for bit, (dx, dy) in enumerate(DOTS) if bits >> bit & 1}
    return found


def test_a_curve_is_where_it_should_be() -> None:
    lines = [text.plain for text in plot([([(0, 0.0), (19, 7.0)], "blue")], 12, 2)]
    assert [text[:2] for text in lines] == ["7 ", "0 "]
    # Ten characters are twenty columns, two lines eight rows: a straight line from below left to above right.
    assert dots(lines, 2) == {(column, 7 - round(column * 7 / 19)) for column in range(20)}


def test_what_is_done_between_two_steps_is_shown() -> None:
    console = RichConsole(file=io.StringIO(), width=80, force_terminal=True)
    view = LiveView(console, "run", 10, 0)
    for record in (None, step_record(step=3)):
        if record is not None:
            view.step(record)
        for doing, shown in (("Evaluating 37/193", True), ("", False)):
            view.progress(doing)
            with console.capture() as drawn:
                console.print(view.render())
            assert ("Evaluating 37/193" in drawn.get()) is shown


def test_every_extreme_of_a_column_is_drawn() -> None:
    points = [(float(i), 9.0 if i == 501 else 0.0) for i in range(1000)]
    lines = [text.plain for text in plot([(points, "blue")], 22, 3)]
    assert {row for column, row in dots(lines, 2) if column == round(501 / 999 * 39)} == set(range(12))


def test_no_curve_without_finite_points() -> None:
    assert plot([([(1, math.nan)], "blue"), ([], "red")], 30, 4) == []
    assert len(plot([([(1, 2.0)], "blue")], 30, 4)) == 4


def test_a_curve_in_bounded_memory() -> None:
    curve = Curve()
    for step in range(1, 100_001):
        curve.add(step, float(step))
    curve.add(100_001, math.nan)
    assert 600 <= len(curve.points) < 1200
    assert all(x == y for x, y in curve.points)
    assert sum(x for x, _ in curve.points) / len(curve.points) == pytest.approx(50_000, rel=0.01)


def drawn(view: LiveView, console: RichConsole) -> str:
    with console.capture() as caught:
        console.print(view.render())
    return caught.get()


def test_what_is_drawn() -> None:
    console = RichConsole(width=100, force_terminal=True, color_system=None)
    view = LiveView(console, "v[/x]", 3000, 0)
    assert "waiting for the first step" in drawn(view, console)
    now = time.time()
    for step in range(1, 101):
        view.step(step_record(step=step, batch=step, time=now + 2 * step, supervised_tokens_per_s=400.0,
                         seconds={"forward": 3.0, "backward": 6.0, "data": 1.0}))  # fmt: skip
    view.evaluation(50, 3.5)
    view.evaluation(100, math.nan)
    view.event(Event(7, "health", "warn", "loss_spike", "[bold]loss 50[/bold]", "skipped"))
    text = drawn(view, console)
    assert "v[/x]" in text  # the name of a run is no markup
    assert "100/3,000" in text
    assert "epoch 1/2" in text
    assert "5% of the epoch" in text
    assert "1:36:40 to go" in text  # 2,900 steps of 2 s
    assert "nan (best 3.5000 at 50)" in text
    assert "1,250 (400 supervised)" in text
    assert "60% backward, 30% forward" in text
    assert "step 7: loss_spike: [bold]loss 50[/bold] → skipped" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_log_goes_above_the_view(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, out = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    view = LiveView(RichConsole(file=out, width=80, force_terminal=True), "name", 10, 0)
    view.start()
    logging.getLogger().warning("something happened")
    view.stop()
    assert "something happened" in out.getvalue()
    assert stream.getvalue() == ""
    assert handler.stream is stream


TMUX = shutil.which("tmux")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[list[str]]:
    tmux = [str(TMUX), "-S", str(tmp_path / "tmux")]
    yield tmux
    subprocess.run([*tmux, "kill-server"], check=False, capture_output=True)


needs_tmux = pytest.mark.skipif(TMUX is None, reason="no tmux on this machine (Debian: apt-get install tmux)")


VIEW = """
import pathlib, signal, sys, time
from lumina.monitor.terminal.console import Console
from tests.monitor.recorded import step_record

pressed = []
signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
with Console(True, 30, 0, "name") as console:
    time.sleep(1.1)  # the view of a run without a step is drawn
    for step in range(1, 31):
        figures = {"supervised_tokens_per_s": 400.0, "seconds": {"forward": 1.0}}
        console.step(step_record(step=step, loss=9 - 0.1 * step, **figures))
        if step == 10:
            console.progress("Evaluating", 1, 2)
            time.sleep(1.1)
            console.progress("Evaluating", 2, 2)
            console.say("Eval at step 10 | " + "a line that is longer than the terminal is wide " * 2)
            console.evaluation(10, 8.5)
        if step == 20:
            pathlib.Path(sys.argv[1], "press").touch()
            while not pressed:
                time.sleep(0.01)
            time.sleep(1.1)
            console.say("SIGINT: stopping")
print("left the view", flush=True)
pathlib.Path(sys.argv[1], "ended").touch()
time.sleep(600)
"""


def appears(path: Path, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.05)


def settled(terminal: list[str], last: str) -> str:
    """The screen, once the terminal has drawn `last`, which the program prints last, and nothing more."""
    end, before = time.monotonic() + 60, ""
    while True:
        screen = subprocess.run([*terminal, "capture-pane", "-p"], capture_output=True, text=True, check=True).stdout
        if last in screen and screen == before:
            return screen
        assert time.monotonic() < end, screen
        before = screen
        time.sleep(0.2)


@needs_tmux
@pytest.mark.parametrize("width", [60, 100])
def test_no_border_is_torn(tmp_path: Path, terminal: list[str], width: int) -> None:
    """After an evaluation, which prints a long line above the view, and after Ctrl-C, whose ^C the terminal itself
    writes, what stands on the screen is one whole frame, none of its words cut off."""
    (tmp_path / "view.py").write_text(VIEW)
    where = Path(__file__).parents[3]
    environment = {**clean_environment(), "TERM": "xterm-256color", "PYTHONPATH": str(where)}
    command = [*terminal, "new-session", "-d", "-x", str(width), "-y", "40"]
    program = f"{sys.executable} {tmp_path / 'view.py'} {tmp_path}"
    subprocess.run([*command, program], check=True, env=environment, cwd=where)
    appears(tmp_path / "press")
    subprocess.run([*terminal, "send-keys", "C-c"], check=True)
    appears(tmp_path / "ended")
    screen = settled(terminal, "left the view")
    lines = screen.splitlines()
    tops, bottoms = ([line for line in lines if line.startswith(corner)] for corner in "╭╰")
    assert (len(tops), len(bottoms)) == (1, 1), screen
    framed = lines[lines.index(tops[0]) : lines.index(bottoms[0]) + 1]
    assert {len(line) for line in framed} == {width}, screen
    assert all(line.endswith("│") for line in framed[1:-1]), screen
    assert "SIGINT: stopping" in screen
    assert "Eval at step 10 | a line" in screen
    for word in (
        "30/30",
        "Loss",
        "PPL",
        "GradNorm",
        "8.2/16.0 GiB",
        "Tokens/s",
        "(400 supervised)",
        "Health",
        "8.5000",
    ):
        assert word in "".join(framed), screen


def test_figures_of_preference_training() -> None:
    rewards = {"rewards/chosen": 0.5, "rewards/rejected": -0.25, "rewards/accuracies": 0.875, "rewards/margins": 0.75}
    for width in (40, 60, 110):
        console = RichConsole(width=width, force_terminal=True, color_system=None)
        view = LiveView(console, "name", 3000, 0)
        view.step(step_record(of_objective=rewards))
        text = drawn(view, console)
        for shown in ("Margin +0.7500", "Accuracy +0.8750", "Chosen +0.5000", "Rejected +-0.2500"):
            assert re.search(shown, text), text
        assert "PPL" not in text  # of a loss over pairs, not over tokens
        assert all(len(line) <= width for line in text.splitlines())


def _slow_preparation(rank: int) -> None:
    """Preparing that is at 12 of 340.1 MB when the view is drawn anew, in a terminal."""
    from lumina.train.objectives.sft import SupervisedFineTuning

    quick = SupervisedFineTuning.prepare_data

    def slow(self: SupervisedFineTuning, *given: Any, progress: Callable[[int, int], None], **named: Any) -> Any:
        progress(12_000_000, 340_100_000)
        deadline = time.monotonic() + 60
        while "Preparing 12/341 MB" not in Path("/proc/self/fd/1").read_text():  # a view is drawn once a second
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return quick(self, *given, progress=progress, **named)

    SupervisedFineTuning.prepare_data = slow  # type: ignore[method-assign, assignment]
    os.environ |= {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "100"}


def test_what_comes_before_the_first_step_is_shown(runs: Runs, conversations: Path, place: Path) -> None:
    job = runs.start(arguments(place / "run", conversations, max_steps=1), patch=_slow_preparation)
    assert job.wait() == [0], job.stderr()
    drawn = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", job.stdout())
    assert re.search("╰─ Preparing 12/341 MB ─+╯", drawn), drawn
    assert drawn.index("Preparing 12/341 MB") < drawn.index("╭─ run · 1 process(es)")
    assert "preparing: " not in job.stderr(), "it is said twice"


@needs_tmux
def test_a_run_in_a_terminal(tmp_path: Path, terminal: list[str]) -> None:
    data = write_conversations(tmp_path / "train.jsonl", 40, seed=1)
    argv = arguments(
        tmp_path / "run", data, max_steps=6, eval_every_n_batches=3, save_every_n_batches=3, eval_fraction=0.2
    )
    ended = tmp_path / "ended"
    (tmp_path / "start").write_text(
        f"{sys.executable} -m lumina train {' '.join(argv)}; echo $? > {ended}; echo it has ended; sleep 600\n"
    )
    environment = {**clean_environment(), "TERM": "xterm-256color"}
    command = [*terminal, "new-session", "-d", "-x", "110", "-y", "45", f"sh {tmp_path / 'start'}"]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 300
    while not ended.exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    screen = settled(terminal, "it has ended")
    assert ended.read_text().strip() == "0", screen
    assert "6/6" in screen
    assert len(re.findall("[\u2801-\u28ff]", screen)) > 50, "no curve"
    assert "Eval at step 6 | Loss:" in screen
    assert screen.count("╭─ run · 1 process(es)") == 1, "the view was left more than once"
    assert not re.search(r"^Epoch 1 \|", screen, re.MULTILINE), "the plain lines are for where there is no terminal"
    assert os.path.exists(tmp_path / "run" / "metrics.jsonl")
    capture = [*terminal, "capture-pane", "-p", "-J", "-S", "-"]  # with what has scrolled off, lines unwrapped
    scrolled = subprocess.run(capture, capture_output=True, text=True, check=True).stdout
    assert "╭─ run ─" not in scrolled, "the view before the first step has left a frame"
    assert "INFO: building the model" in scrolled
    said = re.findall(" INFO (  .+)$", (tmp_path / "run" / "train.log").read_text(), re.MULTILINE)
    assert any(text.startswith("  samples  ") for text in said), "the account is not in the log"
    assert [text for text in said if text not in scrolled] == [], scrolled
