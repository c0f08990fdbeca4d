"""A snapshot of an engine's state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lumina.checkpoint import StagingBuffer, TrainerState, read_trainer_state
from lumina.train.saving import snapshot
from lumina.train.saving.snapshot import load_checkpoint, load_weights, take_snapshot
from tests.train.tiny_engines import make_engine, save, train_step


def test_the_snapshot_is_of_the_step_it_was_taken_at() -> None:
    """Training goes on while it is written."""
    made = make_engine(2)
    train_step(made, 0)
    memory = StagingBuffer(made.device)
    first = take_snapshot(made, TrainerState(step=1), memory)
    copies = {name: torch.cat(parts) for name, parts in first.tensors.items()}
    train_step(made, 1)
    assert all(torch.equal(copies[name], torch.cat(parts)) for name, parts in first.tensors.items())
    places = {name: [part.data_ptr() for part in parts] for name, parts in first.tensors.items()}
    again, held = take_snapshot(made, TrainerState(step=2), memory), memory.bytes
    for name in first.ranges:
        key = f"master/{name}"
        assert [part.data_ptr() for part in again.tensors[key]] == places[key], "the memory is used again"
    assert memory.bytes == held
    again.wait()
    assert again.trainer["optimizer_step"] == 2


@pytest.mark.parametrize("resumed", [True, False])
def test_ranks_have_all_read_before_they_meet_in_a_collective(
    resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which waits for ten minutes, and one of them may have the slower disk."""
    made = make_engine(2)
    train_step(made, 0)
    path = save(tmp_path, made, TrainerState(step=1))
    order: list[object] = []

    def together(read: Callable[[], None]) -> None:
        order.append("begin")
        read()
        order.append("end")

    told = lambda done, total: order.append(done == total)
    monkeypatch.setattr(snapshot, "sync_weights", lambda engine: order.append("collective"))
    if resumed:
        load_checkpoint(path, made, read_trainer_state(path)[1], told, together)
    else:
        load_weights(path, made, told, together)
    assert (order[0], *order[-3:]) == ("begin", True, "end", "collective")
    assert order.count(True) == 1
    made.close()
