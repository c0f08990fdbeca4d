"""Special-token escaping, on vocabularies of a few words of each kind of model that a tokenizer.json may hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from lumina.chat.hf.escaping import Encoded, EscapingEncoder, boundaries, clean, is_failure, special_names
from lumina.chat.hf.jinja import RefusalError


def added(content: str, number: int, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, "special": special, **flags}


def file_of(model: dict[str, Any], *tokens: dict[str, Any], split: bool = False) -> dict[str, Any]:
    """A tokenizer.json; `split`: at white space."""
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    before = {"type": "WhitespaceSplit"} if split else None
    return {"version": "1.0", "added_tokens": list(tokens), **parts, "pre_tokenizer": before, "model": model}


BPE_VOCAB = {"<": 0, "x": 1, ">": 2, "<x": 3, "<x>": 4, "x>": 5}
UNIGRAM_VOCAB = [["?", -9.0], ["a", -1.0], ["b", -2.0], ["<x>", -1.5], ["<", -5.0], ["x", -5.0], [">", -5.0]]
WORDS = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<unk>": 2}, "unk_token": "<unk>"}

BPE = {"type": "BPE", "vocab": BPE_VOCAB}
WRITTEN_WHOLE = file_of({**BPE, "merges": ["< x", "<x >"]}, added("<x>", 4))
WRITTEN_IN_PAIRS = file_of({**BPE, "merges": [["<", "x"], ["<x", ">"]]}, added("<x>", 4))
UNIGRAM = file_of({"type": "Unigram", "unk_id": 0, "vocab": UNIGRAM_VOCAB, "byte_fallback": False}, added("<x>", 3))


@pytest.mark.parametrize(
    ("spec", "named", "typed"),
    [(WRITTEN_WHOLE, 4, [3, 2]), (WRITTEN_IN_PAIRS, 4, [3, 2]), (UNIGRAM, 3, [4, 5, 6])],
    ids=["merges written whole", "merges in pairs", "unigram"],
)
def test_a_name_that_the_vocabulary_holds_is_typed_as_its_letters(
    spec: dict[str, Any], named: int, typed: list[int]
) -> None:
    """The vocabulary's own word for it is the template's alone."""
    encoder = EscapingEncoder(spec)
    escape = encoder.choose_escape(["<x>"])
    text = encoder.to_placeholders(f"<x>{encoder.escape('<x>', escape, declared_only=False)}<x>", escape)
    found = encoder.encode(text)
    assert found.ids.tolist() == [named, *typed, named]
    assert encoder.special_tokens_in("<x><<x>") == [named, named]


def test_a_word_without_a_token_is_no_special_token() -> None:
    """The vocabulary would make one of it, which is refused; the template's own is none of the user's."""
    encoder = EscapingEncoder(file_of(WORDS, added("<unk>", 2), split=True))
    escape = encoder.choose_escape(["a"])
    assert encoder.encode(encoder.to_placeholders("a <unk> b", escape)).ids.tolist() == [0, 2, 1]
    for text in ("a c", encoder.to_placeholders(encoder.escape("a <unk>", escape, False), escape)):
        with pytest.raises(RefusalError, match=r"^its text would become special tokens$"):
            encoder.encode(text)


def test_the_characters_of_placeholders_may_be_typed() -> None:
    """They are counted with the placeholders at first, and then told from them."""
    words = {"type": "WordLevel", "vocab": {"a": 0, "\ufdd1": 1, "<s>": 2, "?": 3}, "unk_token": "?"}
    encoder = EscapingEncoder(file_of(words, added("<s>", 2), split=True))
    text = encoder.to_placeholders("<s> a \ufdd1", encoder.choose_escape(["a \ufdd1"]))
    found = encoder.encode(text)
    assert found.ids.tolist() == [2, 0, 1]
    assert (found.ids.dtype, found.starts.dtype, found.ends.dtype) == (np.int32, np.int64, np.int64)
    assert [text[first:last] for first, last in zip(found.starts[1:], found.ends[1:], strict=True)] == ["a", "\ufdd1"]


def test_what_the_tokenizer_fails_on_is_refused() -> None:
    encoder = EscapingEncoder(WRITTEN_WHOLE)
    nothing: Any = None
    with pytest.raises(RefusalError, match=r"^the tokenizer fails on it: "):
        encoder.encode(nothing)


def test_what_counts_as_a_failure() -> None:
    """A panic in Rust is no Exception to Python; an interruption is none at all."""
    panic = type("PanicException", (BaseException,), {})
    assert is_failure(panic("index out of bounds"))
    assert is_failure(ValueError())
    assert not is_failure(KeyboardInterrupt())
    assert not is_failure(SystemExit())


def test_what_text_may_not_become() -> None:
    """All added tokens but white space and single characters that are not special."""
    names = {"<s>": True, "<think>": False, "\n\n": False, "  ": True, "é": False, "\t": True}
    spec = {"added_tokens": [added(name, 10 + i, special) for i, (name, special) in enumerate(names.items())]}
    assert special_names(spec) == {"<s>": 10, "<think>": 11}
    assert special_names({}) == special_names({"added_tokens": None}) == {}
    assert special_names({"added_tokens": [added("§", 7)]}) == {"§": 7}
    with pytest.raises(ValueError, match=r"^it has a special token of one character, which cannot be told from text$"):
        EscapingEncoder(file_of(WORDS, added("§", 3), split=True))


def test_escapes_alone_where_the_file_says_special() -> None:
    """An answer may hold <think>, which the file declares to be text; a user's question may not."""
    encoder = EscapingEncoder(file_of(WORDS, added("<unk>", 2), added("<think>", 3, special=False), split=True))
    assert encoder.escape("<unk><think>", "^", declared_only=True) == "<^unk><think>"
    assert encoder.escape("<unk><think>", "^", declared_only=False) == "<^unk><^think>"


def test_no_place_lies_within_a_name() -> None:
    """A text that is cut there would have the name as letters."""
    encoder = EscapingEncoder(file_of(WORDS, added("<unk>", 2), added("<think>", 3), split=True))
    text = "a<think>b<unk>"
    found = [encoder.outside_names(text, place) for place in range(len(text) + 1)]
    assert found == [0, 1, *[1] * 6, 8, 9, *[9] * 4, 14]


def test_an_escape_character_that_nobody_typed() -> None:
    encoder = EscapingEncoder(WRITTEN_WHOLE)
    typed = ""
    for _ in range(30):
        character = encoder.choose_escape(["a", typed])
        assert character not in typed
        assert "\ufdd2" <= character <= "\ufdef"
        typed += character
    with pytest.raises(RefusalError, match=r"^it holds every character that is set aside for escaping$"):
        encoder.choose_escape([typed])


def test_lone_surrogates_are_replaced() -> None:
    assert clean("a\ud800é\udfff🙂") == "a\ufffdé\ufffd🙂"
    assert clean("ascii") == "ascii"


def slow_boundary(spans: list[tuple[int, int]], cut: int) -> int:
    """Of the spans of tokens in order: how many end at or before the cut, or -1 less the number of the first across."""
    for number, (start, end) in enumerate(spans):
        if start < cut < end:
            return -1 - number
    return sum(end <= cut for _, end in spans)


def test_boundaries_against_the_slow_reference() -> None:
    """Tokens of several characters, several tokens of one character, and characters that no token stands for."""
    draw = random.Random(0)
    for _ in range(200):
        spans, place = [], 0
        for _ in range(draw.randrange(8)):
            place += draw.choice([0, 0, 1])
            width = draw.choice([1, 1, 2, 4])
            spans += [(place, place + width)] * draw.choice([1, 1, 3])
            place += width
        edges = np.array(spans, dtype=np.int64).reshape(-1, 2)
        encoded = Encoded(np.zeros(len(spans), dtype=np.int32), edges[:, 0], edges[:, 1])
        cuts = range(place + 2)
        assert boundaries(encoded, cuts) == [slow_boundary(spans, cut) for cut in cuts]
