"""Atomic writes: the old contents or the new ones, whatever happens in between."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lumina.files import atomic_file, atomic_folder, file_sha256, rename_durably, write_json, write_text


def contents(folder: Path) -> dict[str, str]:
    """Every file under a folder by its path, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def half(path: Path) -> None:
    path.write_text("half")
    raise RuntimeError("half way")


def test_a_file_takes_its_name_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_file(path) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old"
    assert contents(tmp_path) == {"file": "new"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), atomic_file(path) as scratch:
        half(scratch)
    assert contents(tmp_path) == {"file": "old"}


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """Neither sees the other's scratch file; the last one to end has the name."""
    path = tmp_path / "file"
    with atomic_file(path) as one:
        with atomic_file(path) as other:
            one.write_text("one")
            other.write_text("other")
        assert path.read_text() == "other"
    assert contents(tmp_path) == {"file": "one"}


@pytest.mark.parametrize("when", ["while writing", "after writing"])
def test_killed_while_writing(tmp_path: Path, when: str) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from lumina.files import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as scratch, scratch.open('w') as file:\n"
        "    file.write('{')\n"
        "    file.flush()\n"
        "    if sys.argv[2] == 'after writing':\n"
        "        file.write('}')\n"
        "        file.close()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", code, str(path), when], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    for mode, kept in ((0o600, 0o600), (0o664, 0o664), (0o444, 0o644)):
        path.chmod(mode)
        write_text(path, "new")
        assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", kept)


def test_a_link_is_followed_or_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to("real")
    write_text(link, "new", follow=True)
    assert link.is_symlink()
    assert real.read_text() == "new"
    write_text(link, "newer")
    assert not link.is_symlink()
    assert contents(tmp_path) == {"real": "new", "link": "newer"}


def test_what_is_no_file_is_written_in_place(tmp_path: Path) -> None:
    """Renaming onto /dev/null or a pipe would put a file in its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "text", durable=False)
    write_text(pipe, " more", follow=True)
    assert os.read(reader, 100) == b"text more"
    os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("name", [".", "/"])
def test_a_folder_in_the_way_is_an_os_error(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r".*"):
        write_text(Path(name), "text")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    (tmp_path / ".folder.partial").mkdir()
    (tmp_path / ".folder.partial" / "of a killed process").write_text("")
    with atomic_folder(path) as scratch:
        (scratch / "in").mkdir()
        (scratch / "in" / "file").write_text("new")
        assert not path.exists()
    assert contents(tmp_path) == {"folder/in/file": "new"}


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half way"), atomic_folder(tmp_path / "folder") as scratch:
        half(scratch / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "theirs").write_text("kept")
    with pytest.raises(OSError, match="not empty"), atomic_folder(path) as scratch:
        (scratch / "file").write_text("new")
    assert contents(tmp_path) == {"folder/theirs": "kept"}
    with atomic_folder(path, replace=True) as scratch:
        (scratch / "file").write_text("new")
    assert contents(tmp_path) == {"folder/file": "new"}


def test_rename_durably_replaces_a_folder(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    rename_durably(tmp_path / "new", tmp_path / "old")
    assert contents(tmp_path) == {"old/new": "new"}


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write_json(one, {"b": [1, 2.5], "a": {"y": None, "x": "é"}})
    write_json(other, {"a": {"x": "é", "y": None}, "b": [1, 2.5]})
    assert one.read_bytes() == other.read_bytes()
    assert json.loads(one.read_bytes()) == {"a": {"x": "é", "y": None}, "b": [1, 2.5]}


def test_text_that_utf8_does_not_hold(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "a\ud800b")
    assert (tmp_path / "text").read_bytes() == b"a?b"


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 17])
def test_hash(tmp_path: Path, size: int) -> None:
    """Around the size of a block, and against hashlib on the whole."""
    data = bytes(number % 251 for number in range(1000)) * (size // 1000 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    assert file_sha256(tmp_path / "file") == hashlib.sha256(data[:size]).hexdigest()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    """Also where a library wrote them through a temporary file that its owner alone may read; a file that was there
    keeps the mode that somebody gave it."""
    kept = tmp_path / "kept"
    kept.touch(0o600)
    kept.chmod(0o600)
    program = f"""
import os, sys, tempfile
from pathlib import Path
from lumina.files import atomic_file, atomic_folder
def private(path):
    handle, name = tempfile.mkstemp(dir=path.parent)
    os.close(handle)
    os.replace(name, path)
os.umask({umask})
here = Path(sys.argv[1])
for name in ("file", "kept"):
    with atomic_file(here / name) as scratch:
        private(scratch)
with atomic_folder(here / "folder") as scratch:
    (scratch / "inner").mkdir()
    private(scratch / "one")
    private(scratch / "inner" / "two")
"""
    subprocess.run([sys.executable, "-P", "-c", program, str(tmp_path)], check=True)
    modes = {str(p.relative_to(tmp_path)): p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()}
    usual = 0o666 & ~umask
    assert modes == {"file": usual, "kept": 0o600, "folder/one": usual, "folder/inner/two": usual}
