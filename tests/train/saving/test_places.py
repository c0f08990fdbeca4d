"""Backups that cannot be written are found out before the first step; only a run that begins is refused for them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from lumina.config import Config, UserError
from lumina.train.saving.places import check_backups
from tests.train.tiny_engines import make_config


def with_backups(run: Path, backups: Path) -> Config:
    return make_config(output_dir=str(run), backup_dir=str(backups), backup_every_n_batches=1)


def test_what_will_be_so_for_every_try_refuses_a_run_that_begins(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = with_backups(tmp_path, tmp_path / "file/backups")
    with pytest.raises(UserError, match=r"no backup can be written to .*/file/backups/.*: Not a directory") as refused:
        check_backups(config)
    assert "backup_dir" in refused.value.remedy
    # Claimed, if only before its first checkpoint; or of a version without a lock, or copied without it.
    for begun in (".owner.json", "checkpoints/step-00000002"):
        run = tmp_path / begun.replace("/", "-")
        folder = run / config.experiment_name
        (folder / begun).parent.mkdir(parents=True)
        (folder / begun).write_text('{"token": "a"}') if begun.endswith("json") else (folder / begun).mkdir()
        (line,) = check_backups(with_backups(run, tmp_path / "file/backups"))
        assert line.startswith(f"WARNING: no backup can be written to {tmp_path}/file/backups/")


def test_what_may_pass_refuses_none(tmp_path: Path) -> None:
    """A link whose disk is away."""
    (tmp_path / "backups").symlink_to(tmp_path / "away/backups")
    (line,) = check_backups(with_backups(tmp_path, tmp_path / "backups"))
    assert "No such file or directory; each one that is due is tried" in line


def test_backups_on_the_disk_of_the_checkpoints(tmp_path: Path) -> None:
    """As into the folder that a disk is not mounted on at the moment; the folders need not be there yet."""
    (line,) = check_backups(with_backups(tmp_path / "runs", tmp_path / "mnt/disk"))
    assert f"WARNING: backup_dir {tmp_path}/mnt/disk is on the file system of the run's own folder" in line
    assert not any(tmp_path.iterdir())


def test_backups_on_another_disk(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system to write to")
    with tempfile.TemporaryDirectory(dir=memory) as disk:
        assert check_backups(with_backups(tmp_path, Path(disk, "backups"))) == []
        assert not any(Path(disk).iterdir())


def test_no_backups(tmp_path: Path) -> None:
    assert check_backups(make_config(output_dir=str(tmp_path))) == []
