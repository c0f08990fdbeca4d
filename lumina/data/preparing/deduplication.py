"""Deduplication and split: hold-out by group, duplicates removed across both splits.

One pass over all files gathers a signature of each conversation; one decision in memory follows; preparing a split
then skips what is not its own and counts it. Split and duplicates are decided over conversations, whatever file,
format or line they come from.

Groups: conversations that share an id (an OASST tree's is its tree id), or whose first user message is the same, or
with `near` nearly the same, stay on one side. A prompt of fewer than PROMPT_WORDS words tells nothing ("hi") and groups
nothing. A group's side follows from a hash of its first member, so that it does not depend on the other data.

Duplicates: the first conversation stays, one in the evaluation files before any in the training files.

Near: MinHash (Broder, 1997) of 5-word shingles by rensa, 64 values; candidates share one of 16 bands of 4 values, and
are duplicates when at least NEAR of the 64 values agree, an estimate of the Jaccard similarity with a standard error of
at most 0.06.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.chat import Conversation

TRAIN, EVAL, DUPLICATE = 0, 1, 2
DEDUP = ("none", "exact", "near")
PROMPT_WORDS = 5
SHINGLE_WORDS = 5
VALUES, BANDS = 64, 16
NEAR = 0.8
_WORD = re.compile(r"\w+")

UInt64 = NDArray[np.uint64]
UInt32 = NDArray[np.uint32]


class Signatures(NamedTuple):
    """Signatures of N conversations, equal for equal ones and alike for near-duplicates.

    exact_N, group_N, prompt_N uint64 (0: none); text_NV, prompt_NV uint32: MinHash values of the conversation and of
    its prompt (no columns without `near`).
    """

    exact: UInt64
    group: UInt64
    prompt: UInt64
    text_minhash: UInt32
    prompt_minhash: UInt32


def near_available() -> bool:
    """Whether near-duplicates can be found: rensa is installed."""
    return importlib.util.find_spec("rensa") is not None


def signatures_of(conversations: Sequence[Conversation], near: bool) -> Signatures:
    """The signatures of a block of conversations."""
    rows: list[tuple[int, int, int]] = []
    texts: list[list[int]] = []
    prompts: list[list[int]] = []
    for conversation in conversations:
        whole = "\x00".join(f"{message.role}\x00{message.content}" for message in conversation.messages)
        first = next((message.content for message in conversation.messages if message.role == "user"), "")
        words = _WORD.findall(first.casefold())
        telling = len(words) >= PROMPT_WORDS
        rows.append((_hash(whole), _hash(conversation.id), _hash(" ".join(words)) if telling else 0))
        if near:
            contents = " ".join(message.content for message in conversation.messages)
            texts.append(_minhash(_WORD.findall(contents.casefold())))
            prompts.append(_minhash(words) if telling else [0] * VALUES)
    table = np.array(rows, dtype=np.uint64).reshape(-1, 3)
    shape = (len(rows), VALUES if near else 0)
    minhashes = (np.array(values, dtype=np.uint32).reshape(shape) for values in (texts, prompts))
    return Signatures(table[:, 0], table[:, 1], table[:, 2], *minhashes)


def join_signatures(blocks: Sequence[Signatures]) -> Signatures:
    """Blocks one after another."""
    return Signatures(*(np.concatenate(columns) for columns in zip(*blocks, strict=True)))


def decide(signatures: Signatures, given_N: NDArray[np.uint8], eval_fraction: float, dedup: str) -> NDArray[np.uint8]:
    """TRAIN, EVAL or DUPLICATE for each conversation: uint8[N].

    Args:
        given_N: the split of the file it is in. With an eval_fraction all are TRAIN, and groups are held out.
    """
    count = len(signatures.exact)
    split_N = given_N.copy()
    if eval_fraction > 0:
        groups = _Union(count)
        for key_N in (signatures.group, signatures.prompt, signatures.exact):
            groups.join_equal(key_N)
        for minhash in (signatures.prompt_minhash, signatures.text_minhash):
            for one, other in near_pairs(minhash):
                groups.join(one, other)
        root_N = groups.roots()
        # A root is its group's first conversation; its own hash, not its place, chooses the side.
        salted = signatures.exact[root_N] ^ np.uint64(0x9E3779B97F4A7C15)
        share_N = (salted * np.uint64(0xD1342543DE82EF95) >> np.uint64(11)).astype(np.float64) / 2.0**53
        split_N[share_N < eval_fraction] = EVAL
    if dedup != "none":
        twins = _Union(count)
        twins.join_equal(signatures.exact)
        for one, other in near_pairs(signatures.text_minhash):
            twins.join(one, other)
        root_N = twins.roots()
        order_N = np.lexsort((np.arange(count), split_N != EVAL))  # evaluation first, then as read
        _, first = np.unique(root_N[order_N], return_index=True)
        stays_N = np.zeros(count, dtype=np.bool_)
        stays_N[order_N[first]] = True
        split_N[~stays_N] = DUPLICATE
    return split_N


def near_pairs(minhash_NV: UInt32) -> list[tuple[int, int]]:
    """Pairs (earlier, later) whose MinHash values agree in at least NEAR of the places. Members of a band's bucket are
    compared with its first one: a chain of near-duplicates needs no all-pairs comparison."""
    if minhash_NV.shape[1] == 0:
        return []
    known_N = np.flatnonzero(minhash_NV.any(axis=1))
    pairs: set[tuple[int, int]] = set()
    for band in np.split(minhash_NV[known_N], BANDS, axis=1):
        keys = np.ascontiguousarray(band).view(np.dtype((np.void, band.itemsize * band.shape[1]))).ravel()
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        leader = known_N[first[inverse]]
        alike = (minhash_NV[leader] == minhash_NV[known_N]).mean(axis=1) >= NEAR
        pairs.update((int(a), int(b)) for a, b in zip(leader[alike], known_N[alike], strict=True) if a != b)
    return sorted(pairs)


class _Union:
    """Disjoint sets of conversation numbers (Tarjan, 1975); the smallest number of a set is its root."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, n: int) -> int:
        while self._parent[n] != n:
            self._parent[n] = self._parent[self._parent[n]]
            n = self._parent[n]
        return n

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low

    def join_equal(self, key_N: UInt64) -> None:
        """Joins the conversations of equal keys; key 0 is none."""
        known_N = np.flatnonzero(key_N)
        _, first, inverse = np.unique(key_N[known_N], return_index=True, return_inverse=True)
        leader = known_N[first[inverse]]
        for one, other in zip(leader.tolist(), known_N.tolist(), strict=True):
            if one != other:
                self.join(one, other)

    def roots(self) -> NDArray[np.int64]:
        return np.array([self.root(n) for n in range(len(self._parent))], dtype=np.int64)


def _hash(text: str) -> int:
    """64 bits of the text, never 0; 0 for no text."""
    if not text:
        return 0
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") or 1


def _minhash(words: list[str]) -> list[int]:
    import rensa

    shingles = [" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))]
    minhash: Any = rensa.RMinHash(num_perm=VALUES, seed=1)
    minhash.update(shingles)
    values: list[int] = minhash.digest()
    return values
