"""A snapshot of an engine's state."""

from __future__ import annotations

import torch

from lumina.checkpoint import StagingBuffer, TrainerState
from lumina.train.saving.snapshot import take_snapshot
from tests.train.tiny_engines import make_engine, train_step


def test_the_snapshot_is_of_the_step_it_was_taken_at() -> None:
    """Training goes on while it is written."""
    made = make_engine(2)
    train_step(made, 0)
    memory = StagingBuffer(made.device)
    snapshot = take_snapshot(made, TrainerState(step=1), memory)
    copies = {name: torch.cat(parts) for name, parts in snapshot.tensors.items()}
    train_step(made, 1)
    assert all(torch.equal(copies[name], torch.cat(parts)) for name, parts in snapshot.tensors.items())
    places = {name: [part.data_ptr() for part in parts] for name, parts in snapshot.tensors.items()}
    again, held = take_snapshot(made, TrainerState(step=2), memory), memory.bytes
    for name in snapshot.ranges:
        key = f"master/{name}"
        assert [part.data_ptr() for part in again.tensors[key]] == places[key], "the memory is used again"
    assert memory.bytes == held
    again.wait()
    assert again.trainer["optimizer_step"] == 2
