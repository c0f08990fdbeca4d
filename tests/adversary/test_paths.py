"""Door: paths and disks. Each line: a command line, and what is said; never a traceback (law 7)."""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lumina.cli import main
from lumina.config import UserError, user_error
from lumina.files import atomic_file, atomic_folder
from lumina.infer import export
from tests.infer.small_models import write_small_run

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]
LONG = "x" * 300
SMALL = ("--config", "nano", "--num-workers", "1")
TRAIN = ("train", *SMALL, "--train-data", "good.jsonl")


@contextmanager
def full_disk() -> Iterator[None]:
    """Files of at most 100 bytes: a write fails in the middle, as on a full disk, for root too. No module's bytecode is
    written: Python (3.11) does not see that only its beginning was, and every later import of it would fail."""
    before, bytecode = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = bytecode


def test_an_import_on_a_full_disk_leaves_no_torn_bytecode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_on_a_full_disk.py").write_text("X = " + repr([*range(100)]))
    monkeypatch.syspath_prepend(tmp_path)
    with full_disk():
        importlib.import_module("imported_on_a_full_disk")
    assert [path.name for path in tmp_path.rglob("*.pyc")] == []


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text((json.dumps({"messages": TURNS}) + "\n") * 20)
    Path("latin.txt").write_bytes("é slots=2".encode("latin-1"))
    Path("nul.txt").write_bytes(b"node\x001 slots=2\n")
    os.mkfifo("pipe")
    Path("circle").symlink_to("circle")
    Path("run").mkdir()
    Path("run/config.yaml").write_bytes(b"model_name: \xe9\n")
    Path("run/metrics.jsonl").touch()
    return tmp_path


LINES: list[tuple[tuple[str, ...], str]] = [
    (("validate-data", "good.jsonl", "--fix", "/dev/full"), "No space left on device\n  Free some space"),
    (("validate-data", "good.jsonl", "--fix", "/proc/x"), "error: /proc/x: No such file or directory"),
    (("validate-data", "good.jsonl", "--fix", LONG), "File name too long\n  Choose a shorter name"),
    (("validate-data", "good.jsonl", "--fix", "circle/x"), "error: circle: File exists"),
    (("validate-data", LONG), "File name too long"),
    (("prepare", "good.jsonl", *SMALL, "--cache-dir", "/proc/x"), "cannot make the cache folder /proc/x"),
    (("prepare", "good.jsonl", *SMALL, "--cache-dir", "good.jsonl"), "cannot make the cache folder good.jsonl"),
    (("process-oasst", "good.jsonl", LONG), "File name too long"),
    (("process-oasst", "good.jsonl", "circle/x"), "error: circle: File exists"),
    (("export", "run", "circle/x"), "error: no checkpoint at run"),
    (("train-tokenizer", "good.jsonl", "--out", "/proc/x"), "error: /proc/x: No such file or directory"),
    (("report", LONG), "File name too long"),
    (("report", "run"), "run/config.yaml: it is not UTF-8 text: byte 0xe9"),
    (("runs", LONG), "File name too long"),
    (("config", "show", "run/config.yaml"), "it is not UTF-8 text: byte 0xe9"),
    (("config", "show", "./pipe"), "not a configuration file"),
    (("config", "show", LONG), "File name too long"),
    ((*TRAIN, "--ds-config", "pipe"), "it is a pipe or a device"),
    (
        ("train", *SMALL, "--train-data", "good.jsonl", "--experiment-name", "../../x"),
        "is no name of one folder",
    ),
    ((*TRAIN, "--experiment-name", LONG), "it has more than 200 bytes"),
    ((*TRAIN, "--output-dir", LONG), "File name too long"),
    (
        ("launch", "--dry-run", "--hostfile", "latin.txt", "--", *TRAIN),
        "latin.txt: it is not UTF-8 text",
    ),
    (("launch", "--dry-run", "--hostfile", "nul.txt", "--", *TRAIN), "nul.txt, line 1"),
    (("import", "run", "out"), "config.json"),
    (("export", LONG, "out"), LONG),
]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("line", "said"), LINES, ids=lambda value: " ".join(value)[:40] if type(value) is tuple else ""
)
def test_it_is_one_message(line: tuple[str, ...], said: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(list(line)) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert not (place / "out").exists()


FULL: list[tuple[tuple[str, ...], str]] = [
    (("validate-data", "good.jsonl", "--fix", "fixed.jsonl"), "File too large"),
    (("validate-data", "good.jsonl", "--create-report"), "good.jsonl.report.html: File too large"),
    (("prepare", "good.jsonl", *SMALL, "--cache-dir", "cache"), "File too large"),
    (("train-tokenizer", "good.jsonl", "--out", "tokenizer"), "tokenizer: File too large"),
    (("process-oasst", "trees.jsonl", "out.jsonl"), "out.jsonl: File too large"),
    (("export", "model", "out"), "out: File too large"),
    (("export", "model", "out", "--format", "safetensors"), "out: File too large"),
    (("import", "hf", "out"), "File too large"),
    (("report", "model"), "File too large"),
    (("report", "model", "--out", "out.html"), "out.html: File too large"),
]


@pytest.fixture
def models(place: Path) -> Path:
    """Also a run, the Hugging Face folder that it is exported as, and a tree of OASST."""
    run = write_small_run(place / "model", num_layers=1)
    (run / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 2.0}\n' * 2)
    export(run, place / "hf")
    answer = {"message_id": "b", "parent_id": "a", "text": "hello " * 40, "role": "assistant", "replies": []}
    prompt = {"message_id": "a", "text": "hi", "role": "prompter", "replies": [answer]}
    tree = {"message_tree_id": "a", "tree_state": "ready_for_export", "prompt": prompt}
    (place / "trees.jsonl").write_text(json.dumps(tree) + "\n")
    return place


@pytest.mark.parametrize(("line", "said"), FULL, ids=str)
def test_a_full_disk_is_one_message_and_leaves_nothing_half(
    line: tuple[str, ...], said: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path for path in models.rglob("*")}
    with full_disk():
        assert main(list(line)) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    left = {str(path.relative_to(models)).partition("/")[0] for path in set(models.rglob("*")) - before}
    assert left <= {"cache"}


def test_what_a_disk_says_names_the_file_that_the_user_knows(tmp_path: Path) -> None:
    def half(scratch: Path) -> None:
        scratch.write_bytes(b"x" * 1000)

    with full_disk(), pytest.raises(OSError, match="too large") as caught, atomic_file(tmp_path / "a") as scratch:
        half(scratch)
    assert caught.value.filename == str(tmp_path / "a")
    with full_disk(), pytest.raises(OSError, match="too large") as caught, atomic_folder(tmp_path / "b") as scratch:
        half(scratch / "c")
    assert caught.value.filename == str(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
    told = user_error(OSError(28, "No space left on device", "a", None, "b"))
    assert isinstance(told, UserError)
    assert told.message == "a -> b: No space left on device"
