"""Stop texts: nothing of them is told, nothing else is held back for good."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lumina.infer.generation.detokenizer import Detokenizer


class Letters:
    """Each token is a character."""

    def push(self, token: int) -> str:
        return chr(token)

    def end(self) -> str:
        return ""


def told(text: str, stops: list[str]) -> tuple[list[str], bool]:
    detokenizer, pieces = Detokenizer(Letters(), stops), []
    for letter in text:
        pieces.append(detokenizer.push(ord(letter)))
        if detokenizer.stopped:
            break
    pieces.append(detokenizer.end())
    assert detokenizer.text == "".join(pieces)
    return pieces, detokenizer.stopped


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_is_told_is_the_text_before_the_stop_that_is_complete_first(text: str, stops: list[str]) -> None:
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    pieces, stopped = told(text, stops)
    assert stopped == bool(ends)
    if not ends:
        assert "".join(pieces) == text
        return
    first = min(ends)  # the earliest moment at which some stop is there; of those that end there, the longest
    starts = [first - len(stop) for stop in stops if text[:first].endswith(stop)]
    assert "".join(pieces) == text[: min(starts)]


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    pieces, _ = told("one\nUser two\nUsher", ["\nUser:"])
    assert pieces[:3] == ["o", "n", "e"]
    assert pieces[3:8] == [""] * 5
    assert pieces[8] == "\nUser "
    assert "".join(pieces) == "one\nUser two\nUsher"
