"""kill -9 in the middle of preparing, ten times over: the result is byte-identical to an undisturbed one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.helpers import chat, write_jsonl

ROOT = Path(__file__).parents[3]
SCRIPT = """
import sys
import lumina.data.preparing.pool as pool
import lumina.data.preparing.preparation as preparation
from tests.data.helpers import TOKENIZER, Settings
pool.BYTES_PER_WORKER = 1
preparation.MIN_TASK_BYTES = preparation.MAX_TASK_BYTES = 15_000
settings = Settings(seq_length=256, cache_dir=sys.argv[2])
preparation.prepare([sys.argv[1]], settings, TOKENIZER, workers=2, progress=lambda done, all: print(done, flush=True))
"""


def start(source: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(source), str(cache)], cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1
    )


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
    undisturbed = start(source, tmp_path / "a")
    assert undisturbed.communicate()[0].count("\n") > 100
    assert undisturbed.returncode == 0

    progress = []
    for _ in range(kills):
        process = start(source, tmp_path / "b")
        assert process.stdout is not None
        process.stdout.readline()  # at least one more task is done
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        progress.append(int((process.communicate()[0].split() or ["0"])[-1]))
        assert process.returncode == -signal.SIGKILL, "it ended before the kill: make the input larger"
    assert max(progress) > progress[0], "kept tasks should add up"
    assert start(source, tmp_path / "b").wait() == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
