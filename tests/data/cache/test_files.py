"""What a cache is named for is what was read: a file that changes in between is refused, by its times and its hash."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lumina.config import UserError
from lumina.data.cache.files import Contents
from lumina.files import file_sha256


def rewrite_in_place(path: Path) -> None:
    """Other contents of the same size, with the times that it had: only ctime tells."""
    before = path.stat()
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(reversed(path.read_bytes())))
    os.replace(other, path)


def and_back(path: Path) -> None:
    """What was read in between may be of either."""
    text = path.read_bytes()
    path.write_bytes(b"other")
    path.write_bytes(text)


# What is done to a file after its hash was taken -> whether that is a change of its contents.
CHANGES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "appended": (lambda path: path.write_bytes(path.read_bytes() + b"more"), True),
    "same size and times": (rewrite_in_place, True),
    "replaced": (replace, True),
    "truncated": (lambda path: os.truncate(path, 3), True),
    "there and back": (and_back, True),
    "another mode": (lambda path: path.chmod(0o600), False),
    "another link": (lambda path: os.link(path, path.with_name("link")), False),
    "read": (lambda path: path.read_bytes(), False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str, tmp_path: Path) -> None:
    change, changed = CHANGES[name]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"0123456789")
    contents = Contents([path], tmp_path / "sources.json")
    contents.check_all()
    change(path)
    if changed:
        with pytest.raises(UserError, match="was changed while it was read"):
            contents.check(path)
    else:
        contents.check(path)
        contents.check_all()
    again = Contents([path], tmp_path / "sources.json")
    assert again.digests == [file_sha256(path)], "an old hash for new contents"


def test_a_change_within_a_tick_of_the_clock(tmp_path: Path) -> None:
    """Fifty files that are rewritten right after they were hashed: none keeps its old hash."""
    for number in range(50):
        path = tmp_path / f"{number}"
        path.write_bytes(b"0123456789")
        contents = Contents([path], tmp_path / "sources.json")
        rewrite_in_place(path)
        with pytest.raises(UserError, match="was changed"):
            contents.check(path)
        assert Contents([path], tmp_path / "sources.json").digests == [file_sha256(path)]


def test_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    path, index = tmp_path / "data.jsonl", tmp_path / "sources.json"
    path.write_bytes(b"0123456789")
    digests = Contents([path], index).digests
    access = path.stat().st_atime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lumina.data.cache.files.file_sha256", lambda path: pytest.fail("read again"))
        assert Contents([path], index).digests == digests
    assert path.stat().st_atime_ns >= access
    index.write_text("{")
    assert Contents([path], index).digests == digests
    index.unlink()
    shutil.copy(path, tmp_path / "copy")
    assert Contents([path, tmp_path / "copy"], index).digests == digests * 2
