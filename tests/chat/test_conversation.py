"""The rule of what is supervised, against a loop over messages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.chat import ROLES, Message, is_supervised
from lumina.chat.conversation import loss_mask

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
