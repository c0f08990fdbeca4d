"""Text to ids with a Hugging Face tokenizer.json, so that a control token never comes out of text a user typed.

`tokenizers` reads a control token wherever its name stands in a text. Here the file is loaded under other names: each
control token gets one that nobody can type, since it holds a random number of this process. Before a template is
rendered, names of control tokens in the contents are broken by a mark (`break_names`); in what it rendered, names that
are whole are the template's own, and are given their secret names, while marks are taken out again. What is left to
`tokenizers` is its own algorithm on exactly the text that it would see, but for what only the template may say.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.chat.jinja import RefusalError

# Noncharacters, which no text is meant to hold (Unicode 16, section 23.7): two enclose secret names, one is the mark.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKS = tuple(map(chr, range(0xFDD2, 0xFDF0)))


def clean(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates become U+FFFD, as in Lumina's own tokenizer."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def is_failure(error: BaseException) -> bool:
    """Whether `tokenizers` failed: it raises Exception itself, or panics in Rust, which Python sees as another kind."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class Encoded(NamedTuple):
    """ids_T int32; starts_T, ends_T int64: the characters of the sealed text that each token stands for."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


def control_names(spec: dict[str, Any]) -> dict[str, int]:
    """The added tokens of a tokenizer.json that text may not become, with their ids: all but runs of white space, which
    some vocabularies add to save tokens, and single characters that are not special."""
    tokens = spec.get("added_tokens") or []
    return {
        str(token["content"]): int(token["id"])
        for token in tokens
        if str(token["content"]).strip() and (len(str(token["content"])) > 1 or token.get("special"))
    }


class SealedEncoder:
    """An encoder over text in which control tokens are named in secret."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """`spec`: the contents of tokenizer.json. For one that cannot be read, raises whatever `tokenizers` does."""
        from tokenizers import Tokenizer

        self.controls = control_names(spec)
        if any(len(name) == 1 for name in self.controls):
            raise ValueError("it has a control token of one character, which cannot be told from text")
        secret = secrets.token_hex(16)
        self._secret = {name: f"{_OPEN}{secret}{i}{_CLOSE}" for i, name in enumerate(self.controls)}
        longest_first = sorted(self.controls, key=len, reverse=True)
        # Without control tokens, a pattern that matches nowhere.
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        special = {str(t["content"]) for t in spec.get("added_tokens") or [] if t.get("special")} & set(self.controls)
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self._tokenizer = Tokenizer.from_str(json.dumps(self._sealed(spec)))
        last = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self._is_control_V = np.zeros(1 + max(last, *self.controls.values(), 0), dtype=np.bool_)
        self._is_control_V[list(self.controls.values())] = True

    def _sealed(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The file under secret names; a word of the vocabulary that is spelled like a control token is renamed too."""
        spec = {**spec, "post_processor": None, "truncation": None, "padding": None}
        rename = self._secret
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

    def choose_mark(self, contents: Collection[str]) -> str:
        """A mark that none of the contents holds. Raises RefusalError."""
        for mark in _MARKS:
            if not any(mark in content for content in contents):
                return mark
        raise RefusalError("it holds every character that is set aside for marks")

    def break_names(self, content: str, mark: str, special_only: bool) -> str:
        """The content with a mark inside every control token's name; with `special_only`, leave alone those that the
        file itself declares to be text (an answer may hold <think>)."""
        pattern = self._special if special_only else self._pattern
        broken, more = content, 1
        while more:  # breaking one name can uncover another that overlapped it
            broken, more = pattern.subn(lambda match: match[0][0] + mark + match[0][1:], broken)
        return broken

    def controls_in(self, text: str) -> list[int]:
        """The control tokens named in a text, in order."""
        return [self.controls[match[0]] for match in self._pattern.finditer(text)]

    def seal(self, text: str, mark: str = "") -> str:
        """Rendered text under secret names, without marks."""
        sealed = self._pattern.sub(lambda match: self._secret[match[0]], text)
        return sealed.replace(mark, "") if mark else sealed

    def encode(self, sealed: str) -> Encoded:
        """Sealed text to ids. Raises RefusalError when the tokenizer fails on it, or when its vocabulary made a control
        token of plain text after all."""
        try:
            encoding = self._tokenizer.encode(sealed, add_special_tokens=False)
        except BaseException as error:
            if not is_failure(error):
                raise
            raise RefusalError(f"the tokenizer fails on it: {error}") from None
        ids = np.array(encoding.ids, dtype=np.int32)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        if int(self._is_control_V[ids].sum()) != sealed.count(_CLOSE):
            self._check(ids, sealed)
        return Encoded(ids, offsets[:, 0], offsets[:, 1])

    def _check(self, ids: NDArray[np.int32], sealed: str) -> None:
        """The slow and exact form of the check: names in the text against control tokens in the ids."""
        named = sum(sealed.count(name) for name in self._secret.values())
        if int(self._is_control_V[ids].sum()) != named:
            raise RefusalError("its text would become control tokens")


def _joined(pair: Any) -> str:
    """What a merge makes: written "a b", or ["a", "b"]."""
    return pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair)


def boundaries(encoded: Encoded, cuts: Sequence[int]) -> list[int]:
    """For each cut between characters, how many tokens end at or before it: -1 - n where token n lies across it."""
    found = []
    reached = np.fromiter(accumulate(encoded.ends.tolist(), max), dtype=np.int64, count=len(encoded.ends))
    for cut in cuts:
        before = int(np.searchsorted(encoded.starts, cut, "left"))
        within = int(np.searchsorted(reached, cut, "right"))
        found.append(before if within >= before else -1 - within)
    return found
