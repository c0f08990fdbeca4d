"""Crash consistency of saves: what a power cut at any moment may leave, from the system calls of real ranks.

    python -m tests.crashes [--states 500] [--resumes 6]

`Recording` traces two training ranks (strace) over a few saves, and turns what they did in the run's folder into an
ordered list of operations on a simulated disk. `Disk.states` gives what a crash may leave after each of them. Held to
be on the disk is only what POSIX says: a file's data once the file was flushed (fsync) afterwards, and a folder's
entries, renames among them, once that folder was. Everything else that was done may be there or not, in any
combination: data without its name, a name without its data, a later rename without an earlier one, half of a write.
Every such folder must resume from a checkpoint that is whole and no older than the newest one that was named and
flushed before the crash.

https://www.usenix.org/conference/osdi14/technical-sessions/presentation/pillai (ALICE) explains the method.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumina import checkpoint
from tests.runs import Job, Runs, arguments, write_conversations

STRACE = shutil.which("strace")
CALLS = (
    "openat,open,creat,write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,"
    "mkdirat,ftruncate,sendfile,copy_file_range,link,linkat,symlink,symlinkat"
)
SETTINGS: dict[str, Any] = {
    "precision": "fp32",
    "batch_size": 2,
    "global_batch_size": 4,
    "epochs": 10**6,
    "save_every_n_batches": 5,
    "keep_last": 1,  # the hardest: the old checkpoint goes as soon as the new one is there
    "learning_rate": 1e-5,
    "lr_scheduler": "constant",
    "warmup_ratio": 0,
}


# --- The simulated disk ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Entries:
    """One atomic change of folders: (folder, name, what is there from now on; None: nothing)."""

    changes: tuple[tuple[int, str, int | None], ...]


@dataclass(frozen=True)
class Data:
    """Bytes written to a file at an offset."""

    file: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Flush:
    """A file's data, or a folder's entries, are on the disk: what was done to them before."""

    inode: int


Operation = Entries | Data | Flush
Tree = dict[str, bytes]


@dataclass
class Disk:
    """What was on the disk when the recording began, and what was done since. Inode 0 is the run's folder."""

    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    files: dict[int, bytes] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)

    def durable(self, count: int) -> set[int]:
        """Which of the first `count` operations are on the disk for certain."""
        kept: set[int] = set()
        flushed: set[int] = set()
        for number in range(count - 1, -1, -1):
            match self.operations[number]:
                case Flush(inode):
                    flushed.add(inode)
                case Data(file=file) if file in flushed:
                    kept.add(number)
                case Entries(changes) if all(folder in flushed for folder, _, _ in changes):
                    kept.add(number)
        return kept

    def after(self, chosen: Sequence[tuple[int, Operation]]) -> Tree:
        """Every file's contents by path, when these operations are on the disk."""
        folders = {inode: dict(entries) for inode, entries in self.folders.items()}
        files = {inode: bytearray(data) for inode, data in self.files.items()}
        for _, operation in chosen:
            if isinstance(operation, Data):
                held = files.setdefault(operation.file, bytearray())
                end = operation.offset + len(operation.data)
                if len(held) < end:
                    held.extend(bytes(end - len(held)))  # blocks that were never written read as zeros
                held[operation.offset : end] = operation.data
            elif isinstance(operation, Entries):
                for folder, name, inode in operation.changes:
                    entries = folders.setdefault(folder, {})
                    if inode is None:
                        entries.pop(name, None)
                    else:
                        entries[name] = inode
        found: Tree = {}

        def walk(inode: int, path: str, above: frozenset[int]) -> None:
            for name, child in folders.get(inode, {}).items():
                if child < 0 and child not in above:
                    found[f"{path}{name}/"] = b""
                    walk(child, f"{path}{name}/", above | {child})
                elif child > 0:
                    found[f"{path}{name}"] = bytes(files.get(child, b""))

        walk(0, "", frozenset())
        return found

    def states(self, count: int, rng: random.Random, repeats: int) -> Iterator[Tree]:
        """What a crash after the first `count` operations may leave."""
        done = list(enumerate(self.operations[:count]))
        certain = self.durable(count)
        real = [(number, one) for number, one in done if not isinstance(one, Flush)]
        yield self.after(real)  # a kill: the system goes on, and everything is there
        yield self.after([pair for pair in real if pair[0] in certain])
        for kind in (Entries, Data):  # names without data; data without names
            yield self.after([pair for pair in real if pair[0] in certain or isinstance(pair[1], kind)])
        for _ in range(repeats):
            share, chosen = rng.random(), []
            for number, one in real:
                if number in certain or rng.random() < share:
                    if number not in certain and isinstance(one, Data) and rng.random() < 0.3:
                        one = Data(one.file, one.offset, one.data[: rng.randrange(len(one.data) + 1)])
                    chosen.append((number, one))
            yield self.after(chosen)


# --- The recording --------------------------------------------------------------------------------


class Recording:
    """The disk of a run's folder, filled from strace's log."""

    def __init__(self, run: Path) -> None:
        self._run = str(run)
        self.disk = Disk()
        self._live: dict[int, dict[str, int]] = {0: {}}
        self._sizes: dict[int, int] = {}
        self._next = 1
        self._take(run, 0)
        self.disk.folders = {inode: dict(entries) for inode, entries in self._live.items()}

    def _take(self, folder: Path, inode: int) -> None:
        for path in sorted(folder.iterdir()):
            child = self._new(is_folder=path.is_dir())
            self._live[inode][path.name] = child
            if path.is_dir():
                self._take(path, child)
            else:
                self.disk.files[child] = path.read_bytes()
                self._sizes[child] = len(self.disk.files[child])

    def _new(self, is_folder: bool) -> int:
        """Files have positive numbers, folders negative ones."""
        number, self._next = self._next, self._next + 1
        if is_folder:
            self._live[-number] = {}
            return -number
        self._sizes[number] = 0
        return number

    def read(self, log: Path) -> None:
        """Take in what strace wrote."""
        begun: dict[str, str] = {}
        for line in log.read_text(encoding="ascii", errors="replace").splitlines():
            process, _, call = line.strip().partition(" ")
            call = call.strip()
            if call.endswith("<unfinished ...>"):
                begun[process] = call.removesuffix("<unfinished ...>").rstrip()
                continue
            resumed = re.match(r"<\.\.\. \w+ resumed>(.*)", call)
            if resumed is not None:
                call = begun.pop(process) + resumed[1]
            found = re.match(r"(\w+)\((.*)\)\s+= (-?\d+)(<.*?>)?", call, re.DOTALL)
            if found is not None and int(found[3]) >= 0:
                self._call(found[1], found[2], int(found[3]), _text((found[4] or "")[1:-1]))

    def _call(self, name: str, arguments: str, result: int, opened: str) -> None:
        words = _arguments(arguments)
        if name in ("open", "openat", "creat"):
            if name == "creat" or any("O_CREAT" in word for word in words):
                self._created(opened, truncated=name == "creat" or any("O_TRUNC" in word for word in words))
        elif name in ("write", "pwrite64"):
            data = _bytes(words[1])[:result]
            assert len(data) == result, "strace cut the data short"
            self._written(_descriptor(words[0]), data, int(words[3]) if name == "pwrite64" else None)
        elif name in ("fsync", "fdatasync"):
            inode = self._find(_descriptor(words[0]))
            if inode is not None:
                self.disk.operations.append(Flush(inode))
        elif name in ("rename", "renameat", "renameat2"):
            folders = (None, None) if name == "rename" else (words[0], words[2])
            names = words[:2] if name == "rename" else words[1:4:2]
            paths = [_path(folder, word) for folder, word in zip(folders, names, strict=True)]
            self._renamed(*paths)
        elif name in ("unlink", "rmdir", "unlinkat"):
            self._removed(_path(words[0], words[1]) if name == "unlinkat" else _path(None, words[0]))
        elif name in ("mkdir", "mkdirat"):
            self._made(_path(words[0], words[1]) if name == "mkdirat" else _path(None, words[0]))
        elif any(self._run in _text(word) for word in words):
            raise AssertionError(f"{name} in the run's folder is not simulated")

    # Each does what the call did, on the live tree, and notes the operation.

    def _split(self, path: str) -> tuple[int, str] | None:
        """The folder's inode and the name of a path in the run's folder; None outside it."""
        inside = os.path.relpath(path, self._run)
        if inside.startswith("..") or inside == ".":
            return None
        *folders, name = inside.split("/")
        inode = 0
        for folder in folders:
            inode = self._live[inode][folder]
        return inode, name

    def _find(self, path: str) -> int | None:
        if path == self._run:
            return 0
        with suppress(KeyError):
            place = self._split(path)
            return None if place is None else self._live[place[0]].get(place[1])
        return None  # a file that is removed already

    def _change(self, *changes: tuple[int, str, int | None]) -> None:
        for folder, name, inode in changes:
            if inode is None:
                self._live[folder].pop(name, None)
            else:
                self._live[folder][name] = inode
        self.disk.operations.append(Entries(changes))

    def _created(self, path: str, truncated: bool) -> None:
        place = self._split(path)
        if place is None:
            return
        if place[1] not in self._live[place[0]]:
            self._change((*place, self._new(is_folder=False)))
        elif truncated and self._sizes.get(self._live[place[0]][place[1]], 0):
            raise AssertionError(f"{path} was truncated in place, which a crash makes empty")

    def _written(self, path: str, data: bytes, offset: int | None) -> None:
        inode = self._find(path)
        if inode is not None and data:
            start = self._sizes[inode] if offset is None else offset
            self.disk.operations.append(Data(inode, start, data))
            self._sizes[inode] = max(self._sizes[inode], start + len(data))

    def _renamed(self, source: str, target: str) -> None:
        before, after = self._split(source), self._split(target)
        if before is not None and after is not None:
            self._change((*before, None), (*after, self._live[before[0]][before[1]]))

    def _removed(self, path: str) -> None:
        place = self._split(path)
        if place is not None and place[1] in self._live[place[0]]:
            self._change((*place, None))

    def _made(self, path: str) -> None:
        place = self._split(path)
        if place is not None:
            self._change((*place, self._new(is_folder=True)))


def _text(escaped: str) -> str:
    return re.sub(r"\\x([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), escaped)


def _bytes(word: str) -> bytes:
    return bytes.fromhex(word.strip('"').replace("\\x", ""))


def _arguments(text: str) -> list[str]:
    """Strings are in hexadecimal, so that commas separate."""
    return [word.strip() for word in text.split(",")]


def _descriptor(word: str) -> str:
    found = re.match(r"(?:AT_FDCWD|-?\d+)<(.*)>", word)
    return "" if found is None else _text(found[1])


def _path(folder: str | None, word: str) -> str:
    name = _text(word.strip('"'))
    return name if folder is None else os.path.join(_descriptor(folder), name)


def can_trace() -> bool:
    """Whether strace is there and may trace."""
    return STRACE is not None and subprocess.run([STRACE, "-o", os.devnull, "true"], check=False).returncode == 0


def record(runs: Runs, run: Path, data: Path, saves: int) -> Disk:
    """Train on two ranks and trace them while they write `saves` checkpoints."""
    job = runs.start(arguments(run, data, stage=2, max_steps=10**6, **SETTINGS), 2)
    _until(lambda: bool(_named(run)), job)
    for number in range(2):
        job.signal(signal.SIGSTOP, number)
    _until(lambda: _every_thread(job, r"State:\s+[Tt]"), job)
    recording, log = Recording(run), run.with_name("strace.log")
    assert STRACE is not None
    command = [STRACE, "-f", "-y", "-xx", "-s", str(2**26), "-e", f"trace={CALLS}", "-e", "signal=none", "-o", str(log)]
    pids = [word for process in job.ranks for word in ("-p", str(process.pid))]
    tracer = subprocess.Popen([*command, *pids], stderr=subprocess.PIPE, text=True)
    _until(lambda: _every_thread(job, r"TracerPid:\s+[1-9]"), job)
    first = _named(run)[0]
    for number in range(2):
        job.signal(signal.SIGCONT, number)
    seen: set[int] = set()

    def enough() -> bool:
        seen.update(step for step in _named(run) if step > first)
        return len(seen) >= saves

    _until(enough, job)
    job.signal(signal.SIGTERM)
    assert job.wait() == [75, 75], job.stderr()
    tracer.wait(timeout=200)
    recording.read(log)
    there = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    simulated = recording.disk.after(list(enumerate(recording.disk.operations)))
    simulated = {name: held for name, held in simulated.items() if not name.endswith("/")}
    assert sorted(simulated) == sorted(there), "the simulation lost or made up a file"
    assert [name for name in there if simulated[name] != there[name]] == [], "the simulation is not what was done"
    return recording.disk


def _named(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run / "checkpoints")]


def _every_thread(job: Job, pattern: str) -> bool:
    """Whether a line of its status (proc_pid_status(5)) is this one for every thread of the ranks."""
    threads = [thread for rank in job.ranks for thread in Path(f"/proc/{rank.pid}/task").iterdir()]
    with suppress(OSError):  # a thread that ends just now
        texts = [(thread / "status").read_text(encoding="utf-8", errors="replace") for thread in threads]
        return all(re.search(f"^{pattern}", text, re.MULTILINE) for text in texts)
    return False


def _until(condition: Callable[[], bool], job: Job) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert all(rank.is_alive() for rank in job.ranks), job.stderr()
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- The check ------------------------------------------------------------------------------------


@dataclass
class Checked:
    """What became of the states: how many there were, and of how many system calls; resumed: how many resume from which
    step; faults: what is wrong, with the state."""

    states: int = 0
    operations: int = 0
    resumed: dict[int, int] = field(default_factory=dict)
    faults: list[tuple[str, Tree]] = field(default_factory=list)
    sample: list[Tree] = field(default_factory=list)


def check(disk: Disk, folder: Path, wanted: int, seed: int = 5) -> Checked:
    """Look at `wanted` different states, spread evenly over the operations in the folder of checkpoints."""
    rng, found = random.Random(seed), Checked(operations=len(disk.operations))
    whole: dict[int, Tree] = {}  # every checkpoint as it was when it had its name
    named: list[int] = []  # before operation i: the newest checkpoint whose name is on the disk
    newest, moments = 0, []
    held = disk.after([])
    for number in range(len(disk.operations) + 1):
        if number:
            operation = disk.operations[number - 1]
            if isinstance(operation, Entries) and any(re.match(r"step-\d+$", name) for _, name, _ in operation.changes):
                held = disk.after(list(enumerate(disk.operations[:number])))
                moments.append(number)
        for step, tree in _checkpoints(held).items():
            whole.setdefault(step, tree)
        if number and isinstance(disk.operations[number - 1], Flush):
            certain = disk.durable(number)
            sure = disk.after([(i, disk.operations[i]) for i in sorted(certain)])
            newest = max([newest, *(step for step, tree in _checkpoints(sure).items() if tree == whole.get(step))])
        if not number:
            newest = max(_checkpoints(held))
        named.append(newest)
    seen: set[str] = set()
    prefixes = list(range(len(disk.operations) + 1))
    repeats = 1
    while len(seen) < wanted and repeats <= 64:
        for number in prefixes if repeats > 1 or len(prefixes) < wanted else rng.sample(prefixes, wanted):
            if len(seen) >= wanted:
                break
            for tree in disk.states(number, rng, repeats):
                digest = hashlib.sha256(repr(sorted(tree.items())).encode()).hexdigest()
                if digest in seen or len(seen) >= wanted:
                    continue
                seen.add(digest)
                _look(tree, folder, named[number], whole, found)
        repeats *= 2
    found.states = len(seen)
    found.sample = found.sample[:: max(1, len(found.sample) // 50)]
    return found


def _checkpoints(tree: Tree) -> dict[int, Tree]:
    """The named checkpoints in a tree: every file of each."""
    found: dict[int, Tree] = {}
    for name, data in tree.items():
        place = re.match(r"checkpoints/step-(\d+)/(.+)$", name)
        if place is not None:
            found.setdefault(int(place[1]), {})[place[2]] = data
    return found


def write_tree(tree: Tree, folder: Path) -> Path:
    """Make a state's folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in tree.items():
        if name.endswith("/"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return folder


def _look(tree: Tree, folder: Path, least: int, whole: dict[int, Tree], found: Checked) -> None:
    """Which checkpoint a state would be resumed from, and whether it is the one that was saved."""
    only = {name: data for name, data in tree.items() if name.startswith("checkpoints/")}
    run = write_tree(only, folder / "state")
    chosen = checkpoint.latest_valid(checkpoint.list_checkpoints(run / "checkpoints"))
    if chosen is None:
        found.faults.append((f"no checkpoint is whole; step {least} was on the disk", tree))
        return
    step = checkpoint.step_of(chosen)
    found.resumed[step] = found.resumed.get(step, 0) + 1
    found.sample.append(tree)
    if step < least:
        found.faults.append((f"step {step} although step {least} was on the disk", tree))
    contents = {path.name: path.read_bytes() for path in chosen.iterdir()}
    if contents != whole[step]:
        found.faults.append((f"step {step} is not what was saved", tree))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=500)
    parser.add_argument("--saves", type=int, default=2)
    parser.add_argument("--resumes", type=int, default=6, help="states from which training really goes on")
    options = parser.parse_args()
    if not can_trace():
        sys.exit("strace is not installed (apt-get install strace), or may not trace here")
    with tempfile.TemporaryDirectory(prefix="lumina-crashes-") as name:
        folder = Path(name)
        (folder / "logs").mkdir()
        runs, data = Runs(folder / "logs"), write_conversations(folder / "train.jsonl", 40, seed=11)
        try:
            disk = record(runs, folder / "run", data, options.saves)
            found = check(disk, folder, options.states)
            print(f"{found.states} states of {found.operations} operations; resumed from step: {found.resumed}")
            for reason, _ in found.faults:
                print(f"FAULT: {reason}")
            for tree in random.Random(3).sample(found.sample, min(options.resumes, len(found.sample))):
                run = write_tree(tree, folder / "again")
                step = _named(run)[0]
                settings = {**SETTINGS, "max_steps": step + 2}
                runs.train([*arguments(run, data, stage=2, **settings), "--resume", "auto"], 2)
                print(f"resumed for real: {step} -> {_named(run)[0]}")
        finally:
            runs.close()
    sys.exit(1 if found.faults else 0)


if __name__ == "__main__":
    main()
