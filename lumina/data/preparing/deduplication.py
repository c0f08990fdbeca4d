"""Deduplication and split: hold-out by group, duplicates removed across both splits.

One pass over all files gathers a signature of each conversation; one decision in memory follows; preparing a split
then skips what is not its own and counts it. Split and duplicates are decided over conversations, whatever file,
format or line they come from.

Groups: conversations that share an id (an OASST tree's is its tree id), or whose first user message is the same, or
with `near` nearly the same, stay on one side. A prompt that does not tell (shingles.is_telling; "hi") groups nothing.
A group's side follows from a hash of its first member, so that it does not depend on the other data, unless groups are
so large or so few that this would miss the share asked (hold_out.py).

Duplicates: the first conversation stays, one in the evaluation files before any in the training files. Exact ones say
the same in the same places, reasoning and tool calls among it, with the same tools and the same supervised. Near ones
say nearly the same in their turns, and in what they are set up with (system messages and tools) nearly the same too:
by itself, because one long system message in all conversations must not make duplicates of them.

Near: MinHash (Broder, 1997) of 5-word shingles by rensa, 64 values; candidates share one of 16 bands of 4 values, and
are duplicates when at least NEAR of the 64 values agree, an estimate of the Jaccard similarity with a standard error of
at most 0.06.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.chat import Conversation, Message, MessageColumns, full_text, message_columns
from lumina.data.preparing.hold_out import HoldOut, hold_out
from lumina.data.preparing.shingles import VALUES, is_telling, minhash_of, words_of

TRAIN, EVAL, DUPLICATE = 0, 1, 2
DEDUP = ("none", "exact", "near")
BANDS = 16
NEAR = 0.8

UInt64 = NDArray[np.uint64]
UInt32 = NDArray[np.uint32]


class Signatures(NamedTuple):
    """Signatures of N conversations, equal for equal ones and alike for near-duplicates.

    exact_N, group_N, prompt_N uint64 (0: none); text_minhash_NV, prompt_minhash_NV, setup_minhash_NV uint32: MinHash
    values of the turns, of the prompt, and of system messages with tools (no columns without `near`).
    """

    exact: UInt64
    group: UInt64
    prompt: UInt64
    text_minhash: UInt32
    prompt_minhash: UInt32
    setup_minhash: UInt32


class Decisions(NamedTuple):
    """split_N: TRAIN, EVAL or DUPLICATE for each conversation, uint8[N]; hold_out: what came of an eval_fraction."""

    split: NDArray[np.uint8]
    hold_out: HoldOut | None


def near_available() -> bool:
    """Whether near-duplicates can be found: rensa is installed."""
    return importlib.util.find_spec("rensa") is not None


def signatures_of(conversations: Sequence[Conversation], near: bool) -> Signatures:
    """The signatures of a block of conversations."""
    rows: list[tuple[int, int, int]] = []
    minhashes: list[list[list[int]]] = [[], [], []]
    columns = message_columns([message for conversation in conversations for message in conversation.messages])
    for conversation, exact in zip(conversations, conversation_hashes(conversations, columns), strict=True):
        first = next((message.content for message in conversation.messages if message.role == "user"), "")
        words = words_of(first)
        telling = is_telling(words)
        rows.append((exact, _hash(conversation.id.strip()), _hash(" ".join(words)) if telling else 0))
        if near:
            turns = " ".join(full_text(message) for message in conversation.messages if message.role != "system")
            setup = [message.content for message in conversation.messages if message.role == "system"]
            found = (
                minhash_of(words_of(turns)),
                minhash_of(words if telling else ()),
                _setup_minhash(" ".join([*setup, *conversation.tools])),
            )
            for column, values in zip(minhashes, found, strict=True):
                column.append(values)
    table = np.array(rows, dtype=np.uint64).reshape(-1, 3)
    shape = (len(rows), VALUES if near else 0)
    found_NV = (np.array(values, dtype=np.uint32).reshape(shape) for values in minhashes)
    return Signatures(table[:, 0], table[:, 1], table[:, 2], *found_NV)


@lru_cache(maxsize=64)
def _setup_minhash(text: str) -> list[int]:
    return minhash_of(words_of(text))


def conversation_hash(conversation: Conversation) -> int:
    """64 bits of all that a conversation says, in its places, and of what of it is supervised; ids aside."""
    return conversation_hashes([conversation], message_columns(conversation.messages))[0]


def conversation_hashes(conversations: Sequence[Conversation], columns: MessageColumns) -> list[int]:
    """`conversation_hash` of each of these conversations, whose messages' fields `columns` are."""
    said = [""] * (2 * len(columns.role))
    said[::2], said[1::2] = columns.role, columns.content
    beside = (columns.masked, columns.reasoning, columns.tool_calls, columns.name)
    if any(map(any, beside)) or not all(columns.supervise):
        messages = (message for conversation in conversations for message in conversation.messages)
        for at, message in zip(range(1, len(said), 2), messages, strict=True):
            if message.masked or message.reasoning or message.tool_calls or message.name or not message.supervise:
                said[at] += _beside(message)
    hashes, start = [], 0
    for conversation in conversations:
        stop = start + 2 * len(conversation.messages)
        turns = "\x00".join(said[start:stop])
        hashes.append(_hash("\x00\x05".join([turns, *conversation.tools])))
        start = stop
    return hashes


def _beside(message: Message) -> str:
    """What a message has beside its content, each thing under a number of its own."""
    calls = "".join(f"\x00\x02{call.name}\x00{call.arguments}" for call in message.tool_calls)
    mask = f"\x00\x04{message.supervise} {message.masked}"
    return f"\x00\x01{message.reasoning}{calls}\x00\x03{message.name}{mask}"


def join_signatures(blocks: Sequence[Signatures]) -> Signatures:
    """Blocks one after another."""
    return Signatures(*(np.concatenate(columns) for columns in zip(*blocks, strict=True)))


def decide(signatures: Signatures, given_N: NDArray[np.uint8], eval_fraction: float, dedup: str) -> Decisions:
    """The split of each conversation.

    Args:
        given_N: the split of the file it is in. With an eval_fraction all are TRAIN, and groups are held out.
    """
    split_N, outcome = given_N.copy(), None
    near = signatures.text_minhash.shape[1] > 0
    alike = near_pairs(signatures.text_minhash, _setups(signatures.setup_minhash)) if near else []
    twins = None
    if dedup != "none":
        twins = _Union(len(given_N))
        twins.join_equal(signatures.exact)
        twins.join_pairs(alike)
    if eval_fraction > 0:
        groups = _Union(len(given_N))
        for key_N in (signatures.group, signatures.prompt, signatures.exact):
            groups.join_equal(key_N)
        groups.join_pairs(near_pairs(signatures.prompt_minhash))
        groups.join_pairs(alike)
        stays_N = np.ones(len(given_N), dtype=np.bool_) if twins is None else _firsts(twins.roots(), split_N)
        held_N, outcome = hold_out(groups.roots(), signatures.exact, stays_N, eval_fraction)
        split_N[held_N] = EVAL
    if twins is not None:
        split_N[~_firsts(twins.roots(), split_N)] = DUPLICATE
    return Decisions(split_N, outcome)


def _firsts(root_N: NDArray[np.int64], split_N: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which conversations are the first of their duplicates: those in the evaluation first, then as read."""
    order_N = np.lexsort((np.arange(len(root_N)), split_N != EVAL))
    _, first = np.unique(root_N[order_N], return_index=True)
    stays_N = np.zeros(len(root_N), dtype=np.bool_)
    stays_N[order_N[first]] = True
    return stays_N


def _setups(minhash_NV: UInt32) -> NDArray[np.int64]:
    """A number for each conversation, the same for those that are set up nearly alike: int64[N]."""
    groups = _Union(len(minhash_NV))
    groups.join_pairs(near_pairs(minhash_NV))
    roots_N = groups.roots()
    roots_N[~minhash_NV.any(axis=1)] = -1  # without any
    return roots_N


def near_pairs(minhash_NV: UInt32, within_N: NDArray[np.int64] | None = None) -> list[tuple[int, int]]:
    """Pairs (earlier, later) whose MinHash values agree in at least NEAR of the places, of equal `within_N` if given.
    Members of a band's bucket are compared with its first one: a chain of near-duplicates needs no all-pairs
    comparison."""
    if minhash_NV.shape[1] == 0:
        return []
    known_N = np.flatnonzero(minhash_NV.any(axis=1))
    within = np.zeros(len(known_N), dtype=np.int64) if within_N is None else within_N[known_N]
    pairs: set[tuple[int, int]] = set()
    for band in np.split(minhash_NV[known_N], BANDS, axis=1):
        key = np.concatenate([np.ascontiguousarray(band).view(np.uint8), within[:, None].view(np.uint8)], axis=1)
        keys = np.ascontiguousarray(key).view(np.dtype((np.void, key.shape[1]))).ravel()
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

    def join_pairs(self, pairs: Sequence[tuple[int, int]]) -> None:
        for one, other in pairs:
            self.join(one, other)

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
