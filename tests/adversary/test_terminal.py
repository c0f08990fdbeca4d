"""Door: the terminal. Data, names and models' words that hold escape sequences, in every command's output."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lumina.cli import main
from lumina.commands import COMMANDS
from lumina.files import write_json
from lumina.terminal import Formatter, console, escape_what_is_missing, json_line, printable, say

#: Clears the screen, sets a title, goes back over the line, C1's CSI, turns the text's direction, rich's markup.
HOSTILE = "x\x1b[2Jy\x1b]0;owned\x07\rz\x9b31m\u202egnp.exe[/bold][red]"
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def steers(text: str) -> bool:
    """Whether anything but rich's own colours could steer a terminal."""
    return STEERING.search(re.sub(r"\x1b\[[0-9;]*m", "", text)) is not None or "\x1b[2J" in text


def test_the_check_finds_it() -> None:
    assert steers(HOSTILE)
    assert not steers("\x1b[1;31mred\x1b[0m\ttab\n")


def test_printable_text_says_the_same_again() -> None:
    shown = printable(HOSTILE)
    assert not steers(shown)
    assert printable(shown) == shown
    assert printable("é中🙂\u200f\t\n") == "é中🙂\u200f\t\n"
    assert printable("\x1b\x9b\u202e\udc80") == "\\x1b\\x9b\\u202e\\udc80"


@pytest.mark.parametrize("terminal", [False, True])
def test_consoles_show_it(terminal: bool) -> None:
    out = io.StringIO()
    table = Table("name", title=Text(HOSTILE))
    table.add_row(Text(HOSTILE))
    shown = console(file=out, force_terminal=terminal, width=200)
    for value in (HOSTILE, Text(HOSTILE), table, Panel(Text(HOSTILE))):
        shown.print(value, markup=False)
    say(HOSTILE, file=out)
    out.write(Formatter("%(message)s").format(logging.makeLogRecord({"msg": HOSTILE})))
    assert not steers(out.getvalue())
    assert out.getvalue().count("\\x1b[2J") >= 5


def test_json_says_the_same_to_a_program() -> None:
    text = json_line({HOSTILE: [HOSTILE, "\udc80"]})
    assert not steers(text)
    assert json.loads(text) == {HOSTILE: [HOSTILE, "\udc80"]}


def test_a_locale_without_the_characters_shows_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), "latin-1")
    escape_what_is_missing(out)
    say(json_line({"é中": "🙂…"}), file=out, flush=True)
    assert out.buffer.getvalue() == b'{"\xe9\\u4e2d": "\\ud83d\\ude42\\u2026"}\n'  # type: ignore[attr-defined]
    err = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["lumina", "config", "show", "中"])
    assert main() == 2
    err.flush()
    assert b"\\u4e2d" in err.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data, and the folder of a run, whose names and contents are hostile."""
    monkeypatch.chdir(tmp_path)
    turns = [
        {"role": "user", "content": HOSTILE},
        {"role": "assistant", "content": HOSTILE, "tool_calls": [{"function": {"name": HOSTILE, "arguments": "{}"}}]},
    ]
    lines = [json.dumps({"messages": turns, "source": HOSTILE, HOSTILE: 1})] * 3
    name = HOSTILE.replace("/", "_")
    Path(f"{name}.jsonl").write_text("\n".join([*lines, "{" + HOSTILE, json.dumps({HOSTILE: HOSTILE})]))
    run = tmp_path / "experiments" / name
    (run / "checkpoints/step-00000004").mkdir(parents=True)
    (run / "config.yaml").write_text(f"preset: nano\nmodel_name: {json.dumps(HOSTILE)}\n")
    start = {"time": time.time(), "host": HOSTILE, "pid": 1, "step": 0, "total_steps": 9, "world": 1}
    write_json(
        run / "run.json", {"config": {}, "starts": [{**start, "end": {"state": HOSTILE, "time": 1.0, "step": 4}}]}
    )
    step = {"kind": "step", "step": 4, "loss": 1.0, "time": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    (run / "events.jsonl").write_text(json.dumps({"time": 1.0, "step": 4, "kind": HOSTILE, "message": HOSTILE}) + "\n")
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    return tmp_path


DATA, RUN = HOSTILE.replace("/", "_") + ".jsonl", "experiments/" + HOSTILE.replace("/", "_")
SMALL = ("--config", "nano", "--cache-dir", "cache", "--num-workers", "1")
LAUNCH = ("launch", "--dry-run", "--hostfile", "hosts")

LINES: list[tuple[str, ...]] = [
    ("validate-data", DATA),
    ("validate-data", DATA, "--json", "--create-report"),
    ("prepare", DATA, *SMALL),
    ("prepare", DATA, *SMALL, "--json"),
    ("inspect", DATA, *SMALL, "--table"),
    ("inspect", DATA, *SMALL, "--line", "1", "--table"),
    ("inspect", DATA, *SMALL, "--line", "4"),
    ("process-oasst", DATA, HOSTILE),
    ("runs",),
    ("runs", "--json"),
    ("runs", HOSTILE),
    ("report", RUN),
    ("checkpoints", "list", RUN),
    ("checkpoints", "verify", RUN),
    ("config", "show", HOSTILE),
    ("config", "show", f"{RUN}/config.yaml"),
    (*LAUNCH, "--job", HOSTILE, "--", "train", *SMALL, "--experiment-name", HOSTILE, "--train-data", DATA),
    (*LAUNCH, "--", "train", *SMALL, "--output-dir", HOSTILE, "--train-data", DATA),
    ("train", "--config", "nano", "--train-data", HOSTILE),
    ("train", "--config", "nano", "--train-data", DATA, "--ds-config", HOSTILE),
    ("train", "--config", "nano", "--experiment-name", HOSTILE, "--train-data", DATA),
    ("generate", "--resume", RUN, "--prompt", HOSTILE),
    ("chat", "--resume", RUN),
    ("serve", "--resume", RUN),
    ("export", RUN, HOSTILE),
    ("import", RUN, HOSTILE),
    ("evaluate", RUN, "--data", DATA),
    ("train-tokenizer", HOSTILE, "--out", HOSTILE),
    ("estimate-time", "--config", HOSTILE),
    ("plan", "--config", HOSTILE),
    ("check-environment", "--hostfile", HOSTILE),
    ("no-such-command" + HOSTILE,),
    ("train", "--no-such" + HOSTILE),
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(line)[:24].encode("unicode_escape").decode())
def test_no_command_prints_it(line: tuple[str, ...], place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(list(line))
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capfd.readouterr()
    assert code in (0, 1, 2), err
    assert out + err
    assert not steers(out), repr(out)
    assert not steers(err), repr(err)


def test_every_command_is_in_the_table() -> None:
    assert {line[0] for line in LINES} >= COMMANDS.keys()


def test_log_lines_of_a_process_of_its_own(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lumina", "prepare", DATA, "--dry-run", *SMALL], capture_output=True, text=True
    )
    assert "preparing" in done.stderr
    assert not steers(done.stdout + done.stderr)
