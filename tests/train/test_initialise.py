"""How many ranks share a row of a start, by the processes that it has; what a resume says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lumina.checkpoint import TrainerState, model_shape
from lumina.config import MEMORY_SETTINGS, UserError
from lumina.train.deepspeed import Ranks
from lumina.train.initialise import Start, check_resumed, find_start, sequence_groups
from lumina.train.make_engine import resolve
from lumina.train.recovery.record import RecoveryRecord
from tests.train.tiny_engines import make_config


@pytest.mark.parametrize(
    ("asked", "left", "fitting"),
    [(4, 8, 4), (4, 4, 4), (4, 3, 1), (4, 2, 2), (4, 1, 1), (4, 6, 2), (6, 4, 2), (6, 3, 3), (3, 4, 1), (1, 5, 1)],
)
def test_a_launch_that_lost_ranks_goes_on_with_the_largest_size_that_fits(asked: int, left: int, fitting: int) -> None:
    assert sequence_groups(asked, left, relaunched=True) == fitting
    # By the rule's own words, without its arithmetic.
    assert fitting == max(size for size in range(1, asked + 1) if asked % size == 0 and left % size == 0)


@pytest.mark.parametrize(("asked", "world"), [(4, 3), (4, 2), (2, 1), (3, 4)])
def test_another_launch_is_refused(asked: int, world: int) -> None:
    with pytest.raises(UserError, match=f"sequence_parallel_size {asked} does not divide .*, {world}"):
        sequence_groups(asked, world, relaunched=False)


def test_whole_groups_are_taken_as_they_are() -> None:
    assert sequence_groups(2, 4, relaunched=False) == 2


@pytest.mark.parametrize(("recorded", "lines"), [("", 1), ("float64", 0)])
def test_a_resume_says_that_its_rotary_angles_are_others(recorded: str, lines: int) -> None:
    config, data = make_config(seq_length=2**17 + 1), SimpleNamespace(train=SimpleNamespace(fingerprint="f"))
    state = TrainerState(step=7, model=model_shape(config), data_fingerprint="f", rotary_angles=recorded)
    start, unused = Start(config, Path("run/checkpoints/step-00000007"), state, {}, RecoveryRecord()), Ranks(0, 1, 0, 1)
    given: Any = data
    said = check_resumed(start, config, given, unused)
    assert len(said) == lines
    assert all(line.startswith(f"WARNING: {start.checkpoint}: its 7 steps") for line in said)


def test_ranks_lost_before_the_run_has_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the run's folder says yet what it began with; the launch does. What was wrong from the beginning is
    refused all the same."""
    settings = {"batch_size": 2, "gradient_accumulation_steps": 3, "sequence_parallel_size": 2}
    config, left = make_config(output_dir=str(tmp_path), experiment_name="run", **settings), Ranks(0, 1, 0, 1)
    for began in ("3", None):
        monkeypatch.delenv("LUMINA_FIRST_WORLD", raising=False)
        if began is not None:
            monkeypatch.setenv("LUMINA_FIRST_WORLD", began)
        with pytest.raises(UserError, match="does not divide"):
            find_start(config, tmp_path / "run", left, "night")
    monkeypatch.setenv("LUMINA_FIRST_WORLD", "8")
    start = find_start(config, tmp_path / "run", left, "night")
    found = resolve(start, 1, "cpu").config
    assert (found.sequence_parallel_size, start.ranks_of_row) == (1, 2)
    assert found.global_batch_size == 2 * 3 * 4, "four groups of two ranks"


def test_more_room_is_tried_with_the_micro_batch_that_was_configured(tmp_path: Path) -> None:
    """Each setting that makes activations fewer is known to do so; without it the halved micro-batch stays."""
    plain = {"batch_size": 8, "global_batch_size": 16, "output_dir": str(tmp_path), "experiment_name": "run"}
    lean = {"gradient_checkpointing": 2, "mlp_tile_tokens": 24}
    more: dict[str, dict[str, object]] = {
        "gradient_checkpointing": {"gradient_checkpointing": True},
        "mlp_tile_tokens": {"mlp_tile_tokens": 12},
        "activation_offloading": {"activation_offloading": True},
    }
    assert more.keys() <= {one.name for one in MEMORY_SETTINGS}

    def size(record: RecoveryRecord, settings: dict[str, object]) -> int:
        config = make_config(**plain | settings)
        return resolve(Start(config, None, TrainerState(), {}, record), 1, "cpu").config.batch_size

    record = RecoveryRecord()
    room = resolve(Start(make_config(**plain | lean), None, TrainerState(), {}, record), 1, "cpu").memory
    record.keep_micro_batch(2, room)
    assert size(record, lean) == size(record, {}) == size(record, {"mlp_tile_tokens": 24}) == 2
    for name, changed in more.items():
        assert size(record, lean | changed) == 8, name
    for name in ("sequence_parallel_size", "zero_stage", "half_precision"):  # a start that had less of these
        assert size(RecoveryRecord(micro_batches=[{"size": 2, "memory": room | {name: -1.0}}]), lean) == 8, name
