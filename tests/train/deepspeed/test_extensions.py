"""A killed process's build lock is not waited for; a living one's is, and builds are made one at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lumina.train.deepspeed.extensions import _alone, _remove_stale_locks, build, guard, is_open

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path


def test_a_lock_is_removed_once_nobody_has_it_open(folder: Path) -> None:
    lock = folder / "cpu_adam" / "lock"
    with lock.open("w") as file:
        owner = subprocess.Popen(["sleep", "600"], stdin=file)
    try:
        assert is_open(lock)
        _remove_stale_locks(folder)
        assert lock.exists(), "another process is building"
    finally:
        owner.kill()
        owner.wait()
    assert not is_open(lock)
    _remove_stale_locks(folder)
    assert not lock.exists()


def test_what_it_may_not_look_at_is_left_alone(tmp_path: Path) -> None:
    assert is_open(tmp_path / "lock", proc=tmp_path / "no proc here")


class Builder:
    """As DeepSpeed's op builders are asked."""

    name = "cpu_adam"

    def __init__(self, folder: Path, compatible: bool = True) -> None:
        self._folder, self._compatible = folder, compatible
        self.locked: list[bool] = []

    def is_compatible(self, verbose: bool) -> bool:
        return self._compatible

    def load(self, verbose: bool) -> None:
        self.locked.append((self._folder / "cpu_adam" / "lock").exists())


def test_a_build_does_not_meet_a_dead_ones_lock(folder: Path) -> None:
    (folder / "cpu_adam" / "lock").touch()
    builder, other = Builder(folder), Builder(folder, compatible=False)
    build([builder, None, other])
    assert builder.locked == [False]
    assert other.locked == [], "not for this machine"


class HalfBuilder:
    """A library is written in two halves, as a linker does; a process that is to be killed is so between them."""

    name = "async_io"
    killed = False

    def is_compatible(self, verbose: bool) -> bool:
        return True

    def jit_load(self, verbose: bool = True) -> str:
        library = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / self.name / "async_io.so"
        if not library.exists():
            library.parent.mkdir(exist_ok=True)
            (library.parent / "lock").touch()
            library.write_text("half")
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            library.write_text("half and half")
            (library.parent / "lock").unlink()
        return library.read_text()

    def load(self, verbose: bool) -> str:
        return self.jit_load(verbose)


@pytest.mark.parametrize("by_deepspeed", [True, False])
def test_what_a_killed_build_left_is_built_anew(by_deepspeed: bool, folder: Path) -> None:
    class OpBuilder(HalfBuilder):
        pass

    if by_deepspeed:  # which asks the builder itself
        guard(OpBuilder)
        guard(OpBuilder)
    load = (lambda builder: builder.jit_load()) if by_deepspeed else (lambda builder: build([builder]))
    doomed = OpBuilder()
    doomed.killed = True
    child = os.fork()
    if child == 0:
        load(doomed)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    library = folder / "async_io" / "async_io.so"
    assert library.read_text() == "half"
    load(OpBuilder())
    assert library.read_text() == "half and half"
    built = library.stat().st_mtime_ns
    load(OpBuilder())
    assert library.stat().st_mtime_ns == built, "built again"


def test_one_build_at_a_time(folder: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        with _alone() as found:
            assert found == folder
            inside += 1
            most = max(most, inside)
            time.sleep(0.05)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
