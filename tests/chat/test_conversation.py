"""The rule of what is supervised, against a loop over messages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.chat import ROLES, Message, conversation, is_supervised, open_tokenizer
from lumina.chat.conversation import loss_mask
from tests.small_tokenizer import write_tokenizer

SIZES = st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 2), st.booleans())


@given(st.lists(SIZES, max_size=8))
def test_the_mask_is_content_and_end_of_supervised_messages(sizes: list[tuple[int, int, int, bool]]) -> None:
    """Each message: tokens before its content, content with its end, tokens after it, whether it is supervised."""
    expected, starts, ends = list[int](), list[int](), list[int]()
    for before, content, after, supervised in sizes:
        starts.append(len(expected) + before)
        ends.append(len(expected) + before + content)
        expected += [0] * before + [int(supervised)] * content + [0] * after
    supervised_M = np.array([size[3] for size in sizes], np.bool_)
    mask_T = loss_mask(supervised_M, np.array(starts, np.int64), np.array(ends, np.int64), len(expected))
    assert mask_T.tolist() == expected
    assert mask_T.dtype == np.uint8


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("supervise", [True, False])
def test_only_the_assistant_and_plain_text_are_supervised(role: str, supervise: bool) -> None:
    assert is_supervised(Message(role, "x", supervise)) == (supervise and role in ("assistant", "text"))


def test_a_changed_rule_makes_new_data_but_no_new_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule's version is part of the template's, so of every data fingerprint; 0.1.0's caches are read."""
    folders = (None, write_tokenizer(tmp_path / "imported"))
    before = [open_tokenizer(folder, tried=True) for folder in folders]  # in this process, whose rule is changed
    assert before[0].template_version == "im-roles-2"
    assert open_tokenizer(None, "im-roles-1").template_version == "im-roles-1"
    monkeypatch.setattr(conversation, "SUPERVISION_VERSION", "+stop")
    after = [open_tokenizer(folder, tried=True) for folder in folders]
    for old, new in zip(before, after, strict=True):
        assert new.template_version == old.template_version + "+stop"
        assert new.fingerprint == old.fingerprint
