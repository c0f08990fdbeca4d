"""A sudden end in the middle of preparing, ten times over: the result is byte-identical to an undisturbed one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.helpers import chat, write_jsonl

ROOT = Path(__file__).parents[3]
SCRIPT = """
import signal, sys
import lumina.data.preparing.pool as pool
import lumina.data.preparing.preparation as preparation
from tests.data.helpers import TOKENIZER, Settings
pool.BYTES_PER_WORKER = 1
preparation.MIN_TASK_BYTES = preparation.MAX_TASK_BYTES = 15_000
settings = Settings(seq_length=256, cache_dir=sys.argv[2])
after = float(sys.argv[3])
def progress(done, all):
    global after
    print(done, flush=True)
    if after:  # the kernel ends it then, as kill -9 would: by a clock of its own, whoever else is slow
        signal.setitimer(signal.ITIMER_REAL, after)
    after = 0
preparation.prepare([sys.argv[1]], settings, TOKENIZER, workers=2, progress=progress)
"""


def start(source: Path, cache: Path, after: float = 0.0) -> tuple[int, list[int]]:
    """How it ended, and the progress that it told of; `after` seconds from the first, when at least one more task is
    done, it is ended."""
    command = [sys.executable, "-c", SCRIPT, str(source), str(cache), str(after)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return done.returncode, [int(line) for line in done.stdout.split()]


def contents(cache: Path) -> dict[str, bytes]:
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.long)])
def test_kills_leave_the_same_bytes(tmp_path: Path, kills: int) -> None:
    rng = random.Random(4)
    words = ["alpha", "beta", "gamma", "delta", "漢字", "🙂", "\n"]
    text = lambda: " ".join(rng.choices(words, k=rng.randint(1, 150)))
    lines = [chat(*(f"{i} {text()}" for _ in range(rng.randint(2, 9)))) for i in range(1, 1500)]
    source = write_jsonl(tmp_path / "in.jsonl", [*lines, b"bad"])
    code, told = start(source, tmp_path / "a")
    assert (code, len(told) > 100) == (0, True)

    progress = []
    for _ in range(kills):
        code, told = start(source, tmp_path / "b", 1e-4 + rng.random() * 0.05)
        progress.append(told[-1])
        assert code == -signal.SIGALRM, "it ended before the kill: make the input larger"
    assert progress == sorted(set(progress)), "kept tasks should add up"
    assert start(source, tmp_path / "b")[0] == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
