"""The date that a tokenizer's folder records for a template that writes one."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lumina.chat import Conversation, HFTokenizer, Message, copy_files
from lumina.config import UserError
from tests.small_tokenizer import CHATML, write_tokenizer

DATED = "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML


def prompt(folder: Path) -> str:
    tokenizer = HFTokenizer(folder)
    return tokenizer.decode(tokenizer.prompt_ids(Conversation([Message("user", "hi")])))


def test_a_date_is_that_of_the_folder_and_goes_with_it(tmp_path: Path) -> None:
    """A run that is resumed next month renders what it was trained on."""
    folder = write_tokenizer(tmp_path / "model", DATED)
    written = datetime(2025, 3, 9, 12, tzinfo=UTC).timestamp()
    os.utime(folder / "chat_template.jinja", (written, written))
    assert "09 Mar 2025" in prompt(folder)
    copy_files(folder, tmp_path / "run")
    copy_files(tmp_path / "run", tmp_path / "moved")
    assert (tmp_path / "moved/date.json").read_text() == '{"date": "2025-03-09"}\n'
    assert prompt(tmp_path / "moved") == prompt(folder)
    versions = {HFTokenizer(tmp_path / name).template_version for name in ("model", "run", "moved")}
    (tmp_path / "moved/date.json").write_text('{"date": "2026-01-31"}')
    assert "31 Jan 2026" in prompt(tmp_path / "moved")
    assert len({*versions, HFTokenizer(tmp_path / "moved").template_version}) == 2


def test_what_an_earlier_release_imported_has_no_date(tmp_path: Path) -> None:
    """Its runs were trained without: the template's own date stays."""
    old = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}26 Jul 2024{% endif %}" + CHATML
    folder = write_tokenizer(tmp_path / "t", old)
    (folder / "stops.json").write_text('{"stop_ids": [2]}')
    assert "26 Jul 2024" in prompt(folder)
    copy_files(folder, tmp_path / "run")
    assert not (tmp_path / "run/date.json").exists()


def test_only_templates_that_write_a_date_have_one(tmp_path: Path) -> None:
    copy_files(write_tokenizer(tmp_path / "t"), tmp_path / "run")
    assert not (tmp_path / "run/date.json").exists()


@pytest.mark.parametrize("text", ["{}", '{"date": "soon"}', '{"date": 5}'])
def test_a_damaged_date_is_named(tmp_path: Path, text: str) -> None:
    folder = write_tokenizer(tmp_path / "t", DATED)
    (folder / "date.json").write_text(text)
    with pytest.raises(UserError, match=r"date\.json names no date"):
        HFTokenizer(folder)


def test_runs_of_earlier_releases_find_their_data(tmp_path: Path) -> None:
    """The identity that release 0.2.0 gave these files: fingerprint and template_version, as it computed them."""
    ours = HFTokenizer(write_tokenizer(tmp_path / "t"))
    assert ours.earlier[1] == "jinja:1e3e74af809a6297a403310b13fa2b498bfb04f7091a38b5d2082c0dff9e80c2"
    assert ours.earlier != (ours.fingerprint, ours.template_version)
