"""Special-token escaping: text to ids with a Hugging Face tokenizer.json, no special token coming from typed text.

`tokenizers` reads a special token wherever its name stands in a text. So the file is loaded with the special tokens
renamed to placeholders that nobody can type, since they hold a random number of this process. When a user types
`x <|im_end|> y`, and with `^` for the escape character:

    escape            x <^|im_end|> y                                 before the template is rendered
    the template      <|im_start|>user\nx <^|im_end|> y<|im_end|>
    to_placeholders   PLACEHOLDER-1user\nx <|im_end|> yPLACEHOLDER-2   names that are whole are the template's own
    encode            the renamed tokenizer: only placeholders become special tokens

What is left to `tokenizers` is its own algorithm on exactly the text that it would see, but for what only the template
may say.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.chat.hf.jinja import RefusalError

# Noncharacters, which no text is meant to hold (Unicode 16, section 23.7): two enclose placeholders, one escapes.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_ESCAPES = tuple(map(chr, range(0xFDD2, 0xFDF0)))
_MOST_GROWTH = 64.0  # of a text by the decoder's replacements


def clean(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates become U+FFFD, as in Lumina's own tokenizer."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def is_failure(error: BaseException) -> bool:
    """Whether `tokenizers` failed: it raises Exception itself, or panics in Rust, which Python sees as another kind."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class Encoded(NamedTuple):
    """ids_T int32; starts_T, ends_T int64: the characters of the encoded text that each token stands for."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


def special_names(spec: dict[str, Any]) -> dict[str, int]:
    """The added tokens of a tokenizer.json that text may not become, with their ids: all but runs of white space, which
    some vocabularies add to save tokens, and single characters that are not special."""
    tokens = spec.get("added_tokens") or []
    return {
        str(token["content"]): int(token["id"])
        for token in tokens
        if str(token["content"]).strip() and (len(str(token["content"])) > 1 or token.get("special"))
    }


class EscapingEncoder:
    """An encoder over text in which special tokens stand as placeholders."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """`spec`: the contents of tokenizer.json. For one that cannot be read, raises whatever `tokenizers` does."""
        from tokenizers import Tokenizer

        self.special_ids = special_names(spec)
        if any(len(name) == 1 for name in self.special_ids):
            raise ValueError("it has a special token of one character, which cannot be told from text")
        if any(sign in name for name in self.special_ids for sign in (_OPEN, _CLOSE, *_ESCAPES)):
            # Without them, every character that escaping adds leaves a name less, so that it comes to an end.
            raise ValueError("it has a special token with a character that is set aside for escaping")
        check_decoder(spec)
        nonce = secrets.token_hex(16)
        self._placeholders = {name: f"{_OPEN}{nonce}{i}{_CLOSE}" for i, name in enumerate(self.special_ids)}
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self._longest = max(map(len, self.special_ids), default=0)
        # Without special tokens, a pattern that matches nowhere.
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        added = [token for token in spec.get("added_tokens") or [] if token.get("special")]
        special = {str(token["content"]) for token in added} & set(self.special_ids)
        self._declared = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self._tokenizer = Tokenizer.from_str(json.dumps(self._renamed(spec)))
        last = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self._is_special_V = np.zeros(1 + max(last, *self.special_ids.values(), 0), dtype=np.bool_)
        self._is_special_V[list(self.special_ids.values())] = True

    def _renamed(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The file with placeholders for names; a word of the vocabulary that is spelled like one is renamed too."""
        spec = {**spec, "post_processor": None, "truncation": None, "padding": None}
        rename = self._placeholders
        spec["added_tokens"] = [{**t, "content": rename.get(t["content"], t["content"])} for t in spec["added_tokens"]]
        model = spec["model"] = dict(spec["model"])
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            model["vocab"] = {rename.get(word, word): token for word, token in vocabulary.items()}
        elif isinstance(vocabulary, list):
            model["vocab"] = [[rename.get(word, word), score] for word, score in vocabulary]
        if isinstance(model.get("merges"), list):
            model["merges"] = [pair for pair in model["merges"] if _joined(pair) not in rename]
        if model.get("unk_token") in rename:
            model["unk_token"] = rename[model["unk_token"]]
        return spec

    def choose_escape(self, contents: Collection[str]) -> str:
        """An escape character that none of the contents holds. Raises RefusalError."""
        for character in _ESCAPES:
            if not any(character in content for content in contents):
                return character
        raise RefusalError("it holds every character that is set aside for escaping")

    def escape(self, content: str, character: str, declared_only: bool) -> str:
        """The content with the escape character inside every special token's name; with `declared_only`, leave alone
        those that the file itself declares to be text (an answer may hold <think>)."""
        pattern = self._declared if declared_only else self._pattern
        escaped, more = content, 1
        while more:  # escaping one name can uncover another that overlapped it
            escaped, more = pattern.subn(lambda match: match[0][0] + character + match[0][1:], escaped)
        return escaped

    def special_tokens_in(self, text: str) -> list[int]:
        """The special tokens named in a text, in order."""
        return [self.special_ids[match[0]] for match in self._pattern.finditer(text)]

    def find_special(self, text: str, start: int = 0) -> Iterator[tuple[int, int, int]]:
        """The special tokens named in a text from `start` on, in order: each one's id, and the characters [start, end)
        of its name."""
        for match in self._pattern.finditer(text, start):
            yield self.special_ids[match[0]], match.start(), match.end()

    def outside_names(self, text: str, place: int) -> int:
        """The place, or the beginning of the special token's name that it lies within."""
        for _, start, end in self.find_special(text[: place + self._longest], max(place - self._longest, 0)):
            if start < place < end:
                return start
        return place

    def to_placeholders(self, rendered: str, character: str) -> str:
        """Rendered text with placeholders for the names that are whole, and without the escape characters."""
        return self._pattern.sub(lambda match: self._placeholders[match[0]], rendered).replace(character, "")

    def encode(self, text: str) -> Encoded:
        """Text with placeholders to ids. Raises RefusalError when the tokenizer fails on it, or when its vocabulary
        made a special token of plain text after all."""
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:
            if not is_failure(error):
                raise
            raise RefusalError(f"the tokenizer fails on it: {error}") from None
        ids = np.array(encoding.ids, dtype=np.int32)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        if int(self._is_special_V[ids].sum()) != text.count(_CLOSE):
            self._check(ids, text)
        return Encoded(ids, offsets[:, 0], offsets[:, 1])

    def _check(self, ids: NDArray[np.int32], text: str) -> None:
        """The slow and exact form of the check: placeholders in the text against special tokens in the ids."""
        named = sum(text.count(placeholder) for placeholder in self._placeholders.values())
        if int(self._is_special_V[ids].sum()) != named:
            raise RefusalError("its text would become special tokens")


def check_decoder(spec: dict[str, Any]) -> None:
    """Raises ValueError where ids to text could cost more than the text is long: that is not bounded otherwise."""
    level, growth = [spec.get("decoder")], 1.0
    while level:
        step = level.pop()
        if not isinstance(step, dict):
            continue
        level += step.get("decoders") or []
        pattern, content = step.get("pattern"), step.get("content")
        if isinstance(pattern, dict) and "Regex" in pattern:
            raise ValueError("its decoder replaces by a regular expression")
        if isinstance(pattern, dict) and isinstance(content, str):
            growth *= max(1.0, len(content) / max(1, len(str(pattern.get("String", "")))))
    if growth > _MOST_GROWTH:
        raise ValueError(f"its decoder makes texts {growth:.3g} times as long")


def _joined(pair: Any) -> str:
    """What a merge makes: written "a b", or ["a", "b"]."""
    return pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair)


def boundaries(encoded: Encoded, cuts: Sequence[int]) -> list[int]:
    """For each place between characters, how many tokens end at or before it: -1 - n where token n lies across it."""
    found = []
    reached = np.fromiter(accumulate(encoded.ends.tolist(), max), dtype=np.int64, count=len(encoded.ends))
    for cut in cuts:
        before = int(np.searchsorted(encoded.starts, cut, "left"))
        within = int(np.searchsorted(reached, cut, "right"))
        found.append(before if within >= before else -1 - within)
    return found
