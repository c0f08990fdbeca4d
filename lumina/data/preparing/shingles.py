"""Words of a text for comparison, in every language, and MinHash of their shingles.

A text is normalised first: NFKC (full-width letters and digits, half-width kana, compatibility forms and composed
accents become one form), then case folding. Punctuation, symbols and white space, full-width ones too, are no words and
only separate them. A word is a run of letters, digits and marks. In scripts that are written without spaces between
words (Han, kana, Thai, Lao, Khmer, Burmese, …) each letter with its marks is a word: finding the words themselves
would take a dictionary for each language, and a change of one word changes as few shingles without it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

PROMPT_WORDS = 5
SHINGLE_WORDS = 5
VALUES = 64

_ASCII_WORD = re.compile(r"[a-z0-9_]+")
# Blocks of the scripts without spaces between words: those that Unicode's line breaking (UAX 14) takes for ideographic
# or South-East Asian, Hangul aside, which is written with spaces. In the first ones a letter is about a word; in the
# others, which write sounds, about half of one or less.
_IDEOGRAPHS = ((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029), (0x3400, 0x9FFF), (0xF900, 0xFAFF))
_SOUNDS = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai and Lao; Burmese; Khmer
    *((0x1950, 0x19DF), (0x1A20, 0x1AAF), (0x1B00, 0x1B7F)),  # Tai Le, New Tai Lue; Tai Tham; Balinese
    *((0x3040, 0x312F), (0x31A0, 0x31BF), (0x31F0, 0x31FF)),  # kana, bopomofo
    *((0xA000, 0xA48F), (0xA980, 0xA9FF), (0xAA60, 0xAADF)),  # Yi; Javanese, Burmese; Burmese, Tai Viet
    *((0x16FE0, 0x18DFF), (0x1AFF0, 0x1B2FF)),  # Tangut, Khitan, Nushu; kana
)
_LAST = 0x1FFFF  # above it there are Han (two planes), and characters that are no letters
_HAN_PLANES = "\U00020000-\U0003ffff"


class _Patterns(NamedTuple):
    word: re.Pattern[str]  # a letter of a script without spaces with its marks, or a run of anything else
    sound: re.Pattern[str]  # the former, where it is a sound


def words_of(text: str) -> list[str]:
    """The words of a text, normalised."""
    if text.isascii():  # what follows comes to the same, and takes longer
        return _ASCII_WORD.findall(text.lower())
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _patterns().word.findall(unicodedata.normalize("NFKC", folded))


def is_telling(words: Sequence[str]) -> bool:
    """Whether a prompt of these words says what is asked, as "hi" does not: PROMPT_WORDS of them, where a single sound
    counts as half a word."""
    if len(words) < PROMPT_WORDS or len(words) >= 2 * PROMPT_WORDS:
        return len(words) >= PROMPT_WORDS
    sounds = 0 if all(map(str.isascii, words)) else sum(map(bool, map(_patterns().sound.match, words)))
    return 2 * len(words) - sounds >= 2 * PROMPT_WORDS


def minhash_of(words: Sequence[str]) -> list[int]:
    """MinHash values of the words' shingles: VALUES numbers of 32 bits; zeros without words, which tell nothing."""
    import rensa

    if not words:
        return [0] * VALUES

    shingles = [" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))]
    minhash: Any = rensa.RMinHash(num_perm=VALUES, seed=1)
    minhash.update(shingles)
    values: list[int] = minhash.digest()
    return values


@cache
def _patterns() -> _Patterns:
    """Made at the first text that is not ASCII, from this Python's Unicode data: `re` has no classes of marks or
    scripts."""
    sounds, ideographs = _letters(_SOUNDS), _letters(_IDEOGRAPHS)
    alone = {*sounds, *ideographs}
    marks = _ranges(code for code in range(0x80, _LAST + 1) if unicodedata.category(chr(code))[0] == "M")
    others = _ranges(code for code in range(0x80, _LAST + 1) if chr(code).isalnum() and code not in alone)
    units = _ranges(sounds) + _ranges(ideographs) + _HAN_PLANES
    return _Patterns(
        word=re.compile(f"[{units}][{marks}]*|[a-z0-9_{others}{marks}]+"), sound=re.compile(f"[{_ranges(sounds)}]")
    )


def _letters(blocks: Iterable[tuple[int, int]]) -> list[int]:
    """The letters and digits of these blocks, ascending."""
    return [code for first, last in blocks for code in range(first, last + 1) if chr(code).isalnum()]


def _ranges(codes: Iterable[int]) -> str:
    """Ascending code points as the inside of a character class."""
    spans: list[list[int]] = []
    for code in codes:
        if spans and code == spans[-1][1] + 1:
            spans[-1][1] = code
        else:
            spans.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in spans)
