"""How many ranks share a row of a start, by the processes that it has; what a resume says."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lumina.checkpoint import TrainerState, model_shape
from lumina.config import MEMORY_SETTINGS, Config, UserError, load
from lumina.files import write_json
from lumina.train import make_engine
from lumina.train.deepspeed import Ranks
from lumina.train.initialise import Start, base_of_adapters, check_resumed, find_start, sequence_groups
from lumina.train.make_engine import resolve
from lumina.train.recovery.record import RecoveryRecord
from tests.infer.adapters import rehash
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


@pytest.mark.parametrize(
    ("recorded", "trained", "now", "said"),
    [
        ("", 2**17 + 1, 2**18, True),
        ("float64", 2**17 + 1, 2**18, False),
        ("", 2**17, 2**18, False),  # theirs were right up to there
        ("", 2**17 + 1, 512, False),  # and are float32's here too
        ("", None, 2**18, False),
    ],
)
def test_so_does_a_run_that_begins_with_such_weights(
    recorded: str, trained: int | None, now: int, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(seq_length=now, trained_seq_length=trained, lora_rank=2, init_from=str(tmp_path))
    weights = tmp_path / "checkpoints/step-00000007"
    weights.mkdir(parents=True)
    state = TrainerState(step=7, model=model_shape(config), chat_template="im-roles-2", rotary_angles=recorded)
    write_json(weights / "trainer.json", asdict(state))
    (weights / "rank-00000-of-00001.safetensors").touch()
    rehash(weights)
    assert base_of_adapters(config, Ranks(0, 1, 0, 1), None, TrainerState()) == weights
    assert any("may have been" in text and str(weights) in text for text in caplog.messages) == said


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
    for name in ("sequence_parallel_size", "half_precision"):  # a start that had less of these
        assert size(RecoveryRecord(micro_batches=[{"size": 2, "memory": room | {name: -1.0}}]), lean) == 8, name


def start_of(config: Config, record: RecoveryRecord | None = None, **changes: Any) -> Start:
    return Start(config, None, TrainerState(), {}, record or RecoveryRecord(), **changes)


def test_a_default_stage_that_rises_with_lost_ranks_is_no_more_room(tmp_path: Path) -> None:
    """It rises because what the ranks divide no longer fits; a stage that the user has chosen is another matter."""
    document = tmp_path / "zero3.json"
    document.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 3}}))
    plain, record = make_config(batch_size=8, global_batch_size=64), RecoveryRecord()
    of_more_ranks = {"zero_ranks": 8.0, "zero_stage": -1.0}  # below the one that these tests' single rank has
    record.keep_micro_batch(4, resolve(start_of(plain), 1, "cpu").memory | of_more_ranks)
    assert resolve(start_of(plain, record), 1, "cpu").config.batch_size == 4
    assert resolve(start_of(plain.replace(ds_config=str(document)), record), 1, "cpu").config.batch_size == 8


def test_the_configured_micro_batch_is_kept_for_a_later_start(tmp_path: Path) -> None:
    """By config.yaml, which `--resume RUN` reads, as the ranks of a row are."""
    config, record = make_config(batch_size=8, global_batch_size=32, sequence_parallel_size=2), RecoveryRecord()
    few = start_of(config.replace(sequence_parallel_size=1), record, ranks_of_row=2)
    record.keep_micro_batch(4, resolve(few, 1, "cpu").memory)
    found = resolve(few, 1, "cpu").with_micro_batch(2, 1)  # once more, while it trains
    assert (found.config.batch_size, found.config.gradient_accumulation_steps) == (2, 16)
    file = tmp_path / "config.yaml"
    file.write_text(found.kept.to_yaml())
    again = load(str(file), {})
    assert (again.batch_size, again.gradient_accumulation_steps, again.sequence_parallel_size) == (8, 4, 2)
    roomy = again.replace(sequence_parallel_size=1, gradient_checkpointing=True)
    later = resolve(start_of(roomy, record, ranks_of_row=2), 1, "cpu").config
    assert (later.batch_size, later.global_batch_size) == (8, 32)


def test_a_record_without_the_memory_is_said_to_hold() -> None:
    config = make_config(batch_size=8, global_batch_size=32)
    found = resolve(start_of(config, RecoveryRecord(micro_batch_size=4)), 1, "cpu")
    assert found.config.batch_size == 4
    assert sum("remove `micro_batch_size` from that file" in line for line in found.report) == 1
    for batch_size, record in [(4, RecoveryRecord(micro_batch_size=4)), (8, RecoveryRecord())]:
        found = resolve(start_of(config.replace(batch_size=batch_size), record), 1, "cpu")
        assert not any("recovery.json" in line for line in found.report)


def test_a_rank_that_cannot_read_its_files_has_met_the_others_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """They ask each other for the smallest GPU; one that failed before would leave them waiting."""
    asked: list[bool] = []
    monkeypatch.setattr(make_engine, "smallest_memory", lambda: asked.append(True))
    config = make_config(ds_config="nowhere.json")
    with pytest.raises(UserError, match="nowhere"):
        resolve(start_of(config, first_world=4), 2, "cpu")
    assert asked == [True]
