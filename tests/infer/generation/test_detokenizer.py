"""Stop texts: nothing of them is told, nothing else is held back for good."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lumina.chat import AnswerDelta, ContentReader, ToolCall
from lumina.infer.generation.detokenizer import Detokenizer


class Letters:
    """Each token is a character."""

    def push(self, token: int) -> str:
        return chr(token)

    def end(self) -> str:
        return ""


class Cases:
    """Each token is a character: reasoning in capitals, content in small letters, a call for a full stop."""

    def push(self, token: int) -> AnswerDelta:
        if chr(token) == ".":
            return AnswerDelta(tool_calls=(ToolCall("f", "{}"),))
        return AnswerDelta(reasoning=chr(token)) if chr(token).isupper() else AnswerDelta(content=chr(token))

    def end(self) -> AnswerDelta:
        return AnswerDelta()


def told(text: str, stops: list[str]) -> tuple[list[str], bool]:
    detokenizer, pieces = Detokenizer(ContentReader(Letters()), stops), []
    for letter in text:
        pieces.append(detokenizer.push(ord(letter)).content)
        if detokenizer.stopped:
            break
    pieces.append(detokenizer.end().content)
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


def test_stop_texts_are_looked_for_in_content_alone() -> None:
    detokenizer = Detokenizer(Cases(), ["AB", "ab", "."])
    deltas = [detokenizer.push(ord(letter)) for letter in "ABa."]
    assert "".join(delta.reasoning for delta in deltas) == "AB"
    assert [len(delta.tool_calls) for delta in deltas] == [0, 0, 0, 1]
    assert not detokenizer.stopped
    assert [delta.content for delta in deltas] == [""] * 4  # the "a" may begin a stop text
    assert detokenizer.push(ord("c")).content == "ac"
    assert detokenizer.push(ord("a")).content == detokenizer.push(ord("b")).content == ""
    assert detokenizer.stopped
    assert detokenizer.push(ord("C")) == detokenizer.end() == AnswerDelta()
