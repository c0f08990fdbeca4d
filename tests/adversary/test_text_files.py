"""Door: a text or JSON file that somebody else wrote. Each line: what is in it, and what is said."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lumina.chat import copy_files
from lumina.checkpoint import TrainerState, read_trainer_state
from lumina.config import UserError
from lumina.files import FormatError, inside, read_object, read_text, write_json, write_text
from lumina.infer.hf.tensors import SINGLE, TensorFiles

CONTENTS = [
    (b"\xff\xfe{\x00}\x00", "it is not UTF-8 text: byte 0xff at offset 0"),
    ('{"a": "é"}'.encode("latin-1"), "it is not UTF-8 text: byte 0xe9 at offset 7"),
    (b'{"a": 1', "line 1, column 8: not valid JSON"),
    (b"", "line 1, column 1: not valid JSON"),
    (b"[" * 200_000, "it is nested too deeply"),
    (b'{"a":' * 200_000, "it is nested too deeply"),
    (b'{"a": ' + b"9" * 5000 + b"}", "a number has thousands of digits"),
    (b'{"a": NaN}', "NaN is no number"),
    (b'{"a": -1e999}', "-1e999 is no number"),
    (b"[1, 2]", "is not a JSON object"),
    (b'{"a": "' + b"x" * 2000 + b'"}', "it has more than 1,000 bytes"),
]


@pytest.mark.parametrize(("contents", "said"), CONTENTS, ids=lambda value: repr(value)[:30])
def test_what_is_no_json_is_said_with_its_path(tmp_path: Path, contents: bytes, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(contents)
    most = 1000 if "1,000" in said else 10**7
    with pytest.raises((OSError, FormatError)) as caught:
        read_object(path, most=most, finite=True)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_byte_order_mark_is_no_character(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(tmp_path / "a.json") == {"a": 1}


@pytest.mark.timeout(100)
def test_a_pipe_in_a_files_place_is_refused_at_once(tmp_path: Path) -> None:
    """Opened for reading, a pipe that nobody writes to would be waited for without end."""
    os.mkfifo(tmp_path / "config.json")
    for path in (tmp_path / "config.json", Path("/dev/zero")):
        with pytest.raises(OSError, match="a pipe or a device"):
            read_text(path)


def test_a_path_that_no_file_has(tmp_path: Path) -> None:
    for path in ("a\0b", str(tmp_path / ("x" * 300)), str(tmp_path)):
        with pytest.raises(OSError):  # noqa: PT011 - of any kind that the outermost layer tells
            read_text(path)


def test_links_lead_to_nothing_outside_a_models_folder(tmp_path: Path) -> None:
    secret, model, hub = tmp_path / "secret", tmp_path / "model", tmp_path / "hub"
    secret.write_text("{}")
    model.mkdir()
    (model / "own.json").write_text("{}")
    (model / "tokenizer.json").symlink_to(model / "own.json")
    (model / "tokenizer_config.json").symlink_to(secret)
    assert read_text(inside(model, "tokenizer.json")) == "{}"
    with pytest.raises(OSError, match="leads out of its folder"):
        inside(model, "tokenizer_config.json")
    with pytest.raises(UserError, match="leads out of its folder"):
        copy_files(model, tmp_path / "copied")
    assert not (tmp_path / "copied/tokenizer_config.json").exists()
    (model / SINGLE).symlink_to(secret)
    with pytest.raises(UserError, match="leads out of its folder"), ExitStack() as files:
        TensorFiles(model, files)
    (model / "config.json").symlink_to("config.json")  # in a circle
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        read_text(inside(model, "config.json"))
    # The hub's cache: snapshots/REVISION/NAME -> ../../blobs/HASH, and to nothing else above it.
    (hub / "blobs").mkdir(parents=True)
    (hub / "blobs/1a").write_text("{}")
    (hub / "snapshots/rev").mkdir(parents=True)
    (hub / "snapshots/rev/config.json").symlink_to("../../blobs/1a")
    (hub / "snapshots/rev/tokenizer.json").symlink_to(secret)
    assert read_text(inside(hub / "snapshots/rev", "config.json")) == "{}"
    with pytest.raises(OSError, match="leads out of its folder"):
        inside(hub / "snapshots/rev", "tokenizer.json")


LOCALE = """
import locale, sys
from pathlib import Path
from lumina.files import read_text, write_text
assert 'utf' not in locale.getencoding().lower()
path = Path(sys.argv[1])
write_text(path, read_text(path) + '\\u00df\\u4e2d')
"""


def test_the_locale_chooses_no_encoding(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("é", encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-P", "-c", LOCALE, str(path)], env=environment, check=True)
    assert path.read_text(encoding="utf-8") == "éß中"


def test_a_written_file_has_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").stat().st_mode == usual.stat().st_mode


TRAINERS: list[tuple[Any, str]] = [
    ({"step": "many"}, "`step` is 'many'"),
    ({"step": None}, "`step`"),
    ({"model": 3}, "`model`"),
    ({"world": [1]}, "`world`"),
    ({"guard": "x"}, "`guard`"),
    ({"base": {"path": 1}}, "`base.path`"),
    ([1], "is not a JSON object"),
    ("text", "is not a JSON object"),
]


@pytest.mark.parametrize(("trainer", "said"), TRAINERS, ids=str)
def test_an_odd_trainer_json_is_said(tmp_path: Path, trainer: Any, said: str) -> None:
    value = {**asdict(TrainerState(step=3)), **trainer} if isinstance(trainer, dict) else trainer
    write_json(tmp_path / "trainer.json", value)
    with pytest.raises(FormatError) as caught:
        read_trainer_state(tmp_path)
    assert said in str(caught.value)
