"""kill -9 anywhere: two ranks go on to the same bytes; import and export leave nothing half."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lumina.checkpoint import integrity_error, list_checkpoints
from tests.runs import (
    PATIENCE,
    ROOT,
    Runs,
    arguments,
    clean_environment,
    differing,
    final,
    held_at,
    newest,
    write_conversations,
)

pytestmark = pytest.mark.timeout(3600)

SETTINGS: dict[str, Any] = {
    "precision": "fp32",
    "batch_size": 2,
    "global_batch_size": 4,
    "keep_last": 1,
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "warmup_ratio": 0,
}

# Runs a command again and again in a forked process that kills itself at its next flush or rename: the first one, the
# second one, … until the command comes to its end. Prints how each ended.
KILLER = """
import json, os, signal, sys
import torch, transformers
from lumina.cli import main
from lumina.infer.hf import exporting, importing
words, target = json.loads(sys.argv[1]), sys.argv[2]
for moment in range(1, 400):
    process = os.fork()
    if process == 0:
        seen = 0
        def counted(call):
            def kill_or_call(*given, **named):
                global seen
                seen += 1
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*given, **named)
            return kill_or_call
        for name in ("fsync", "replace", "rename"):
            setattr(os, name, counted(getattr(os, name)))
        sys.stdout.flush()
        os._exit(main([word.replace("TARGET", f"{target}-{moment}") for word in words]))
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(json.dumps([moment, status]), flush=True)
    if status != -signal.SIGKILL:
        break
"""


def kill_at_moments(words: list[str], target: Path) -> dict[int, int]:
    """How the command ended (minus a signal's number) when it was killed at its first flush or rename, at its second,
    and so on until its end."""
    command = [sys.executable, "-P", "-c", KILLER, json.dumps(words), str(target)]
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_import_and_export_leave_nothing_half(runs: Runs, conversations: Path, place: Path) -> None:
    runs.train(arguments(place / "run", conversations, **{**SETTINGS, "max_steps": 1}))
    ends = kill_at_moments(["export", str(place / "run"), "TARGET"], place / "exported")
    assert list(ends.values()) == [-9] * (len(ends) - 1) + [0]
    assert len(ends) > 2
    whole = place / f"exported-{max(ends)}"
    half = [n for n in ends if (place / f"exported-{n}").exists() and files(place / f"exported-{n}") != files(whole)]
    assert half == []

    ends = kill_at_moments(["import", str(whole), "TARGET"], place / "imported")
    assert list(ends.values()) == [-9] * (len(ends) - 1) + [0]
    assert len(ends) > 2
    for moment in ends:
        run = place / f"imported-{moment}"
        if run.exists():
            assert [integrity_error(saved) for saved in list_checkpoints(run / "checkpoints")] == [None]
            assert files(run).keys() == files(place / f"imported-{max(ends)}").keys()


@pytest.mark.long
def test_twenty_kills_in_saves_of_two_ranks(runs: Runs, conversations: Path, place: Path) -> None:
    """Twenty starts: costs minutes. After each, a checkpoint is whole; the end is that of the undisturbed run."""
    settings = {**SETTINGS, "save_every_n_batches": 1}
    rng, steps = random.Random(6), 250
    runs.train(arguments(place / "calm", conversations, stage=2, max_steps=steps, **settings), 2)
    run = place / "run"
    argv = [*arguments(run, conversations, stage=2, max_steps=steps, **settings), "--resume", "auto"]
    kills = 0
    while kills < 20:
        job = runs.start(argv, 2, patch=partial(held_at, steps - 1))
        job.wait_for_step(1)
        deadline = time.monotonic() + PATIENCE
        while not list((run / "checkpoints").glob(".*.partial")):
            assert time.monotonic() < deadline
        time.sleep(rng.random() * 0.01)
        for rank in rng.sample(job.ranks, 2):
            rank.kill()
        job.kill()
        kills += 1
        if list_checkpoints(run / "checkpoints"):
            assert integrity_error(newest(run)) is None, f"kill {kills}"
    runs.train(argv, 2)
    assert differing(final(run, steps), final(place / "calm", steps)) == []


def _small_tasks(rank: int) -> None:
    """Preparing takes many tasks, so that a kill comes in the middle of it."""
    from lumina.data.preparing import preparation

    preparation.MIN_TASK_BYTES = preparation.MAX_TASK_BYTES = 4_000


@pytest.mark.long
def test_twenty_kills_in_preparing_with_two_ranks(runs: Runs, place: Path) -> None:
    """Twenty starts: costs minutes. The cache is that of an undisturbed start, byte for byte."""
    data = write_conversations(place / "train.jsonl", 3000, seed=11)
    rng = random.Random(6)

    def argv(name: str) -> list[str]:
        cache = place / f"cache-{name}"
        return arguments(place / name, data, stage=2, **{**SETTINGS, "max_steps": 1, "cache_dir": str(cache)})

    def prepared(name: str) -> dict[str, bytes]:
        (folder,) = [path.parent for path in (place / f"cache-{name}").glob("*/meta.json")]
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    assert runs.start(argv("calm"), 2, _small_tasks).wait() == [0, 0]
    inside = 0
    for _ in range(20):
        job = runs.start(argv("run"), 2, _small_tasks)
        before = {path for path in (place / "cache-run").glob("*.partial/*.json")}
        deadline = time.monotonic() + PATIENCE
        done = partial((place / "cache-run").glob, "*/meta.json")
        while {path for path in (place / "cache-run").glob("*.partial/*.json")} <= before and not list(done()):
            assert all(rank.is_alive() for rank in job.ranks), job.stderr()
            assert time.monotonic() < deadline, job.stderr()
        time.sleep(rng.random() * 0.02)
        job.kill()
        inside += not list(done())
    assert inside == 20, "it was prepared before the kill: make the input larger"
    assert runs.start(argv("run"), 2, _small_tasks).wait() == [0, 0]
    assert prepared("run") == prepared("calm")
