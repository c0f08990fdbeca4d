"""recovery.json, and the answers.json of version 0.1.0."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from lumina.train.recovery.record import RecoveryRecord

RECORD = RecoveryRecord(skipped_steps=[3, 8], rollbacks=2, micro_batch_size=4, global_batch_size=32)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    RECORD.write(tmp_path)
    assert RecoveryRecord.read(tmp_path) == RECORD
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


def test_a_run_that_begins_anew_has_none(tmp_path: Path) -> None:
    RECORD.write(tmp_path)
    (tmp_path / "answers.json").write_text("{}")
    RecoveryRecord.remove(tmp_path)
    assert list(tmp_path.iterdir()) == []
