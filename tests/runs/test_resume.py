"""Killed anywhere, resumed, a run ends in the same weights and moments, bit for bit (laws 5 and 6)."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import tests.runs as real
from lumina import checkpoint
from lumina.checkpoint import write
from lumina.train.saving.saves import Saves
from tests.runs import Runs, State, arguments, differing, final, held_at, losses, newest

pytestmark = pytest.mark.timeout(900)  # the first start on a machine compiles DeepSpeed's operators

STEPS, EVERY = 14, 3
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_every_n_batches": EVERY,
    "batch_size": 2,
    "global_batch_size": 4,
    "learning_rate": 1e-3,
}


@dataclass
class Undisturbed:
    """Ends of runs that nothing disturbed, each made once."""

    runs: Runs
    data: Path
    folder: Path
    _ends: dict[tuple[int, int, str], State] = field(default_factory=dict)

    def end(self, world: int, stage: int, precision: str) -> State:
        key = (world, stage, precision)
        if key not in self._ends:
            run = self.folder / "-".join(map(str, key))
            self.runs.train(arguments(run, self.data, stage=stage, precision=precision, **SETTINGS), world)
            self._ends[key] = final(run, STEPS)
        return self._ends[key]


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    folder = tmp_path_factory.mktemp("undisturbed")
    yield Undisturbed(runs, conversations, folder)
    shutil.rmtree(folder)


def each_step_once(run: Path) -> bool:
    return [record["step"] for record in real.steps(run)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("world", "stage", "precision", "kills"),
    [
        (1, 1, "bf16", 1),
        pytest.param(1, 2, "fp32", 1, marks=pytest.mark.long),
        pytest.param(1, 3, "bf16", 1, marks=pytest.mark.long),
        pytest.param(2, 1, "fp32", 1, marks=pytest.mark.long),
        (2, 2, "bf16", 5),
        pytest.param(2, 3, "fp32", 1, marks=pytest.mark.long),
    ],
)
def test_killed_and_resumed(
    world: int,
    stage: int,
    precision: str,
    kills: int,
    runs: Runs,
    conversations: Path,
    undisturbed: Undisturbed,
    place: Path,
) -> None:
    run = place / "killed"
    argv = arguments(run, conversations, stage=stage, precision=precision, **SETTINGS)
    rng = random.Random(100 * world + stage)
    for step in sorted(rng.sample(range(1, STEPS - 3), kills)):
        job = runs.start([*argv, "--resume", "auto"], world, partial(held_at, STEPS - 1))
        job.wait_for_step(step)
        job.kill()
    runs.train([*argv, "--resume", "auto"], world)
    assert differing(final(run, STEPS), undisturbed.end(world, stage, precision)) == []
    assert each_step_once(run)


def _die(rank: int, *, whom: int, where: str, first: int) -> None:
    """Makes rank `whom` kill itself when the save after that of step `first` reaches the function `where`. All wait
    for the first one: while it is being written the second is put off, and might be the run's last, whose writer
    nothing but a launcher tells of a rank that is gone."""
    at_step = Saves.at_step

    def settled(self: Saves) -> None:
        at_step(self)
        assert self._state.step != first or self._saver.wait(60)

    Saves.at_step = settled  # type: ignore[method-assign]
    original = getattr(write, where)

    def dies(path: Path, *rest: Any) -> Any:
        if rank == whom and "checkpoints/" in str(path) and checkpoint.name_of(first) not in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, *rest)

    setattr(write, where, dies)


@pytest.mark.parametrize(
    ("whom", "where"),
    [
        pytest.param(1, "fsync", marks=pytest.mark.long),  # its file written, not yet flushed
        (1, "write_json"),  # flushed, no entry yet: rank 0 waits for it
        (0, "manifest_entry"),  # every file whole, no manifest
    ],
)
def test_killed_in_the_middle_of_a_save(
    whom: int, where: str, runs: Runs, conversations: Path, undisturbed: Undisturbed, place: Path
) -> None:
    run = place / "torn"
    argv = arguments(run, conversations, stage=2, precision="bf16", **SETTINGS)
    job = runs.start(argv, 2, partial(_die, whom=whom, where=where, first=EVERY))
    codes = job.wait()
    assert codes[whom] == -signal.SIGKILL
    assert codes[1 - whom] not in (0, 75), "the other rank went on or called it a success"
    assert [path.name for path in checkpoint.list_checkpoints(run / "checkpoints")] == [checkpoint.name_of(EVERY)]
    assert list((run / "checkpoints").glob(".*.partial")), "the kill came before the save"

    runs.train([*argv, "--resume", "auto"], 2)
    assert f"resumed at step {EVERY}" in (run / "train.log").read_text()
    assert differing(final(run, STEPS), undisturbed.end(2, 2, "bf16")) == []
    assert not list((run / "checkpoints").glob(".*")), "a torn save is still there"
    assert each_step_once(run)


@pytest.mark.parametrize(
    "name",
    [
        "rank-00001-of-00002.safetensors",
        "manifest.json",
        pytest.param("rank-00000-of-00002.safetensors", marks=pytest.mark.long),
        pytest.param("trainer.json", marks=pytest.mark.long),
    ],
)
def test_a_flipped_byte_in_the_newest_checkpoint(
    name: str, runs: Runs, conversations: Path, undisturbed: Undisturbed, place: Path
) -> None:
    run = place / "flipped"
    argv = arguments(run, conversations, stage=2, precision="bf16", **SETTINGS)
    job = runs.start([*argv, "--set", "save_async=false"], 2, partial(held_at, STEPS - 1))
    job.wait_for_step(2 * EVERY + 1)
    job.kill()
    damaged = newest(run)
    flip_a_byte(damaged / name, random.Random(name))

    job = runs.train([*argv, "--resume", "auto"], 2)
    (warning,) = [line for line in job.stderr().splitlines() if "is damaged" in line]
    assert str(damaged) in warning
    assert name in warning
    before = int(damaged.name.split("-")[1]) - EVERY
    assert f"resumed at step {before}" in (run / "train.log").read_text()
    assert differing(final(run, STEPS), undisturbed.end(2, 2, "bf16")) == []


def flip_a_byte(path: Path, rng: random.Random) -> None:
    with path.open("r+b") as file:
        where = rng.randrange(path.stat().st_size)
        file.seek(where)
        (value,) = file.read(1)
        file.seek(where)
        file.write(bytes([value ^ 0xFF]))


def test_another_world_size_and_stage(runs: Runs, conversations: Path, place: Path) -> None:
    """2 processes, then 1, then 2, each life under another stage, against one life of 2 processes."""
    settings = {**SETTINGS, "precision": "fp32", "lr_scheduler": "constant", "warmup_ratio": 0.0}
    settings.pop("max_steps")
    whole, moved = place / "whole", place / "moved"
    runs.train(arguments(whole, conversations, stage=2, max_steps=9, **settings), 2)
    settings.pop("global_batch_size")  # kept from the run's first start, whatever the world size
    lives = [(2, 2, 3, {"gradient_accumulation_steps": 1}), (1, 3, 6, {}), (2, 1, 9, {})]
    for world, stage, until, more in lives:
        argv = arguments(moved, conversations, stage=stage, max_steps=until, **settings, **more)
        runs.train([*argv, "--resume", "auto"], world)
    assert [record["step"] for record in real.steps(moved)] == list(range(1, 10))
    assert losses(moved) == pytest.approx(losses(whole), abs=1e-4, rel=0)
    one, other = final(moved, 9), final(whole, 9)
    for key, value in one.items():
        assert torch_norm(value - other[key]) <= 1e-4 * torch_norm(other[key]), key


def torch_norm(tensor: Any) -> float:
    return float(tensor.double().norm())


def test_sigterm_saves_and_exits_75(runs: Runs, conversations: Path, undisturbed: Undisturbed, place: Path) -> None:
    run = place / "stopped"
    argv = arguments(run, conversations, stage=2, precision="fp32", **SETTINGS)
    job = runs.start(argv, patch=partial(held_at, STEPS - 2))
    job.wait_for_step(4)
    job.signal(signal.SIGTERM)
    assert job.wait() == [75]
    stopped = real.steps(run)[-1]["step"]
    assert stopped < STEPS
    assert newest(run).name == checkpoint.name_of(stopped)
    assert "Traceback" not in job.stderr()

    runs.train([*argv, "--resume", "auto"])
    assert f"resumed at step {stopped}" in (run / "train.log").read_text()
    assert differing(final(run, STEPS), undisturbed.end(1, 2, "fp32")) == []
    assert each_step_once(run)


def test_sigterm_to_one_rank_stops_all(runs: Runs, conversations: Path, place: Path) -> None:
    run = place / "stopped"
    endless = SETTINGS | {"max_steps": 100_000, "epochs": 100_000}
    job = runs.start(arguments(run, conversations, stage=1, precision="fp32", **endless), 2)
    job.wait_for_step(2)
    job.signal(signal.SIGTERM, rank=1)
    assert job.wait() == [75, 75]
    assert newest(run).name == checkpoint.name_of(real.steps(run)[-1]["step"])
