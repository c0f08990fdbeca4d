"""recovery.json, and the answers.json of version 0.1.0."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from lumina.train.recovery.record import RecoveryRecord

RECORD = RecoveryRecord(skipped_steps=[3, 8], rollbacks=2, micro_batch_size=4, global_batch_size=32)
MANY, FEW = {"zero_ranks": 4.0, "sequence_parallel_size": 4.0}, {"zero_ranks": 2.0, "sequence_parallel_size": 2.0}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = replace(RECORD, micro_batches=[{"size": 2, "memory": {"mlp_tile_tokens": 1 / 24}}])
    written.write(tmp_path)
    assert RecoveryRecord.read(tmp_path) == written
    assert [path.name for path in tmp_path.iterdir()] == ["recovery.json"]


def test_the_old_file_is_taken_over_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = {"past": [3, 8], "rollbacks": 2, "batch_size": 4, "global_batch_size": 32}
    (tmp_path / "answers.json").write_text(json.dumps(old))
    with caplog.at_level(logging.WARNING, "lumina"):
        found = RecoveryRecord.read(tmp_path)
        assert found == RECORD
        assert not (tmp_path / "recovery.json").exists(), "who reads it may not own the run yet"
        found.take_over(tmp_path)
        assert [record.getMessage() for record in caplog.records] == [
            f"{tmp_path / 'answers.json'} is called recovery.json now: what it says is taken over"
        ]
        assert RecoveryRecord.read(tmp_path) == RECORD
    assert len(caplog.records) == 1
    (tmp_path / "answers.json").write_text(json.dumps({"past": [99]}))
    RecoveryRecord().take_over(tmp_path)
    assert RecoveryRecord.read(tmp_path) == RECORD, "the new file counts where both are"


@pytest.mark.parametrize("text", ["", "[]", '{"unknown": 1}', "{"])
@pytest.mark.parametrize("name", ["recovery.json", "answers.json"])
def test_what_cannot_be_read_is_an_empty_record(text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert RecoveryRecord.read(tmp_path) == RecoveryRecord()


def test_a_micro_batch_of_less_room_is_not_kept_where_there_is_more() -> None:
    """A node is lost and comes back, and is lost again: each time what that start found to fit."""
    record = RecoveryRecord()
    record.keep_micro_batch(4, MANY)
    record.keep_micro_batch(2, FEW)
    record.keep_micro_batch(1, FEW)
    assert [record.largest_micro_batch(room) for room in (MANY, FEW, MANY)] == [4, 1, 4]
    assert record.largest_micro_batch(FEW | {"zero_ranks": 1.0}) == 1, "with less still, no more than that"
    assert record.largest_micro_batch(FEW | {"mlp_tile_tokens": 1 / 4096}) is None, "a setting that was off"
    assert record.largest_micro_batch(MANY | {"zero_ranks": 8.0}) is None
    assert replace(record, micro_batch_size=3).largest_micro_batch(MANY | {"zero_ranks": 8.0}) == 3, "an old record"


def test_a_run_that_begins_anew_has_none(tmp_path: Path) -> None:
    RECORD.write(tmp_path)
    (tmp_path / "answers.json").write_text("{}")
    RecoveryRecord.remove(tmp_path)
    assert list(tmp_path.iterdir()) == []
