"""Words for comparison: every language, one form for what is the same, and English as it was."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.data.preparing.shingles import PROMPT_WORDS, is_telling, words_of
from tests.data.languages import LANGUAGES

LATIN = ["The", "quick", "brown", "Fox", "jumps", "over", "12", "lazy", "dogs"]
TEXTS = st.lists(
    st.sampled_from([word for words in LANGUAGES.values() for word in words.split()] + LATIN), min_size=1, max_size=30
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("用Python写一个函数，谢谢！", ["用", "python", "写", "一", "个", "函", "数", "谢", "谢"]),
        ("ＡＢＣ　１２３．ＧＰＵ", ["abc", "123", "gpu"]),  # full width, with an ideographic space and full stop
        ("ｶﾞｿﾘﾝ", ["ガ", "ソ", "リ", "ン"]),  # half-width kana
        ("cafe\u0301 CAFÉ", ["café", "café"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("दिन दान", ["दिन", "दान"]),  # vowel signs are part of the word
        ("ที่นี่", ["ที่", "นี่"]),  # and of the letter
        ("น้ำ น\u0e49\u0e4d\u0e32", ["น้ํ", "า"] * 2),
        ("안녕 세계", ["안녕", "세계"]),
        ("𠀋𠮷 葛\ufa0b", ["𠀋", "𠮷", "葛", unicodedata.normalize("NFKC", "\ufa0b")]),
        ("don't stop_now 3.5", ["don", "t", "stop_now", "3", "5"]),
        ("😀 — …", []),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert words_of(text) == words


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_plain_english_is_as_it_was(text: str) -> None:
    assert words_of(text) == re.findall(r"\w+", text.casefold())


@given(TEXTS, st.lists(st.sampled_from("，。！？、…—「」 \n\u3000;!"), min_size=30, max_size=30))
def test_punctuation_width_and_case_change_no_word(parts: list[str], marks: list[str]) -> None:
    """Between words that are separated in any case."""
    wide = lambda word: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in word)
    text = " ".join(parts)
    assert words_of("".join(part + mark for part, mark in zip(parts, marks, strict=False))) == words_of(text)
    assert words_of(" ".join(map(wide, parts)).upper()) == words_of(text)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert words_of(unicodedata.normalize(form, text)) == words_of(text)


@given(st.text())
def test_no_letter_is_lost_and_words_stay_words(text: str) -> None:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    letters = [c for c in folded if c.isalnum() or c == "_"]
    words = words_of(text)
    assert [c for word in words for c in word if c.isalnum() or c == "_"] == letters
    if all(unicodedata.normalize("NFKC", word) == word for word in words):
        assert words_of(" ".join(words)) == words


@pytest.mark.parametrize("language", LANGUAGES)
def test_spaces_between_words_make_no_difference(language: str) -> None:
    assert words_of(LANGUAGES[language]) == words_of(LANGUAGES[language].replace(" ", ""))
    assert len(words_of(LANGUAGES[language])) > len(LANGUAGES[language].split())


@pytest.mark.parametrize(
    "text", ["hi", "hello there", "你好", "你好吗", "こんにちは", "สวัสดีครับ", "안녕하세요", "thanks a lot!"]
)
def test_a_greeting_tells_nothing(text: str) -> None:
    assert not is_telling(words_of(text))


@pytest.mark.parametrize(
    "text",
    [
        "what is the time now",
        "今天天气好吗",
        "東京の天気は？",
        "วันนี้อากาศเป็นอย่างไร",
        "오늘 서울 날씨가 어떻게 되나요",
        "用GPU训练模型",
    ],
)
def test_a_question_tells(text: str) -> None:
    assert is_telling(words_of(text))
    assert len(words_of(text)) >= PROMPT_WORDS
