"""Chunks against a slow reference over lists of tokens: what each holds, that each supervised token is a target once,
and that the account adds up."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lumina.chat import ROLES, RenderedBlock
from lumina.data.account import DROPPED_UNSUPERVISED, Account
from lumina.data.cache.chunks import Chunks
from lumina.data.preparing.chunking import ChunkRule, to_chunks

SYSTEM, USER, ASSISTANT, TEXT = (ROLES.index(name) for name in ("system", "user", "assistant", "text"))


class Said(NamedTuple):
    """A message of `size` tokens after `head` of the template's; `supervised` from there on."""

    role: int
    head: int
    size: int
    supervised: bool = False
    repeated: bool = False


messages = st.builds(
    lambda role, head, size, on, again: Said(
        role, head if role != ASSISTANT or head else 0, size, role in (ASSISTANT, TEXT) and on and not again, again
    ),
    st.sampled_from([SYSTEM, USER, USER, ASSISTANT, ASSISTANT, TEXT]),
    st.integers(0, 2),
    st.integers(1, 40),
    st.sampled_from([True, True, True, False]),
    st.sampled_from([False] * 5 + [True]),
)
conversations = st.lists(st.lists(messages, min_size=1, max_size=8), min_size=1, max_size=4)
windows, shares = st.integers(16, 70), st.sampled_from([0.0, 0.1, 0.25, 0.5])


def block_of(conversations: list[list[Said]]) -> RenderedBlock:
    """A block whose token ids are 0, 1, 2, …: a token's id is its place."""
    flat = [message for conversation in conversations for message in conversation]
    offsets = np.cumsum([0, *(message.head + message.size for message in flat)])
    mask = [int(m.supervised and at >= m.head) for m in flat for at in range(m.head + m.size)]
    return RenderedBlock(
        np.arange(offsets[-1], dtype=np.int32),
        np.array(mask, dtype=np.uint8),
        offsets.astype(np.int64),
        np.cumsum([0, *map(len, conversations)]).astype(np.int64),
        np.array([m.supervised for m in flat]),
        np.array([m.head for m in flat], dtype=np.int64),
        np.arange(len(conversations), dtype=np.int64),
        np.array([m.repeated for m in flat]),
        np.array([m.role for m in flat], dtype=np.int8),
    )


def listed(chunks: Chunks) -> list[tuple[list[int], list[int], int]]:
    """(ids, mask, tokens of context) of each chunk."""
    return [
        (chunks.ids[a:b].tolist(), chunks.mask[a:b].tolist(), context)
        for (a, b), context in zip(pairwise(chunks.offsets.tolist()), chunks.context.tolist(), strict=True)
    ]


# --- The reference --------------------------------------------------------------------------------


def slow_chunks(conversation: list[Said], first: int, window: int, budget: int) -> list[tuple[list[int], int]]:
    """(places, tokens of context) of each chunk of one conversation, whose tokens are first, first + 1, …"""
    message_of = {}
    for number, message in enumerate(conversation):
        for _ in range(message.head + message.size):
            message_of[first + len(message_of)] = number
    end = first + len(message_of)
    begins = {next(p for p in range(first, end) if message_of[p] == n) for n in range(len(conversation))}
    heads = Counter[int]()
    supervised = set()
    for place in range(first, end):
        message = conversation[message_of[place]]
        if message.supervised and heads[message_of[place]] >= message.head:
            supervised.add(place)
        heads[message_of[place]] += 1
    if end - first <= window:
        return [(list(range(first, end)), 0)]
    supervised.discard(first)  # nothing comes before it, from which it could be predicted
    out, start = [], first
    while start < end:
        context: list[int] = []
        if start > first:
            context = slow_context(conversation, message_of, supervised, first, start, end, budget)
            needs_one = start not in begins or start in supervised
            if needs_one and (not context or context[-1] != start - 1):
                context.append(start - 1)
        limit = start + window - len(context)
        stop = end if end <= limit else slow_stop(conversation, message_of, begins, supervised, start, limit, budget)
        out.append(([*context, *range(start, stop)], len(context)))
        start = stop
    return out


def slow_context(
    conversation: list[Said],
    message_of: dict[int, int],
    supervised: set[int],
    first: int,
    start: int,
    end: int,
    budget: int,
) -> list[int]:
    target = next((place for place in range(start, end) if place in supervised), None)
    if target is None or not budget:
        return []
    opening: list[int] = []
    for place in range(first, end):
        if conversation[message_of[place]].role != SYSTEM:
            break
        opening.append(place)
    heads = [message.head for message in conversation]
    if conversation[0].role == USER and len(heads) > 1 and heads[0] > max(heads[1:]):
        opening = list(range(first, first + heads[0]))
    preamble = [] if conversation[0].role == SYSTEM else opening
    if len(opening) > budget or (opening and opening[-1] >= start):
        opening = []
    run: list[int] = []
    if conversation[message_of[target]].role == ASSISTANT:
        for place in range(target - 1, first - 1, -1):
            if conversation[message_of[place]].role == USER:
                run.insert(0, place)
            elif run:
                break
    run = [place for place in run if place not in preamble]
    tail = run[-(budget - len(opening)) :] if budget > len(opening) else []
    return [*opening, *(place for place in tail if place < start)]


def slow_stop(
    conversation: list[Said],
    message_of: dict[int, int],
    begins: set[int],
    supervised: set[int],
    start: int,
    limit: int,
    budget: int,
) -> int:
    ends = [place for place in range(start + 1, limit + 1) if place in begins]
    teaching = [stop for stop in ends if any(place in supervised for place in range(start, stop))]
    if not budget or not any(place in supervised for place in range(start, limit)):
        return max(ends, default=limit)
    parts_no_answer = [
        stop
        for stop in teaching
        if (conversation[message_of[stop - 1]].role, conversation[message_of[stop]].role) != (USER, ASSISTANT)
    ]
    return max(parts_no_answer or teaching or [limit])


def of_before(offsets: list[int], window: int) -> list[tuple[int, int, int]]:
    """(start, stop, context) of each chunk as versions 0.1.0 and 0.2.0 made them."""
    chunks: list[tuple[int, int, int]] = []
    start, context = offsets[0], 0
    for begin, end in pairwise(offsets):
        if end - start + context <= window:
            continue
        if begin > start:
            chunks.append((start, begin, context))
            start, context = begin, 0
        while end - start + context > window:
            stop = start + window - context
            chunks.append((start, stop, context))
            start, context = stop, 1
    return [*chunks, (start, offsets[-1], context)]


# --- Against it -----------------------------------------------------------------------------------


@example([[Said(4, 0, 1, True, False), Said(4, 2, 40, True, False)]], 16, 0.25)  # begins with what has no target
@given(conversations, windows, shares)
def test_chunks_against_the_slow_reference(given_: list[list[Said]], window: int, share: float) -> None:
    block, rule = block_of(given_), ChunkRule(window, "split", share)
    expected, first = [], 0
    for conversation in given_:
        for places, context in slow_chunks(conversation, first, window, rule.budget):
            mask = [int(block.mask[place]) for place in places]
            mask[: max(context, 1)] = [0] * max(context, 1)
            if any(mask):
                expected.append((places, mask, context))
        first += sum(message.head + message.size for message in conversation)
    assert listed(to_chunks(block, rule, Account())) == expected


@given(conversations, windows, shares)
def test_every_supervised_token_is_a_target_once(given_: list[list[Said]], window: int, share: float) -> None:
    block = block_of(given_)
    targets = Counter[int]()
    for ids, mask, context in listed(to_chunks(block, ChunkRule(window, "split", share), Account())):
        own = [place for place, supervised in zip(ids, mask, strict=True) if supervised]
        assert own, "a chunk without a supervised token"
        assert len(ids) <= window
        assert not any(mask[: max(context, 1)])
        assert ids[context:] == list(range(ids[context], ids[-1] + 1))
        for place in own:
            assert ids[ids.index(place) - 1] == place - 1, "the token before a target is the one before it"
        targets.update(own)
    bounds = set(block.message_offsets[block.conversation_offsets].tolist())  # their first token follows nothing
    assert targets == Counter({place: 1 for place in np.flatnonzero(block.mask).tolist() if place not in bounds})


@given(conversations, windows)
def test_without_context_chunks_are_those_of_before(given_: list[list[Said]], window: int) -> None:
    """But for the chunks without a supervised token, and the token before an answer that begins with its content."""
    given_ = [[message._replace(head=message.head or 1) for message in conversation] for conversation in given_]
    block, before = block_of(given_), []
    for first, last in pairwise(block.conversation_offsets.tolist()):
        for start, stop, context in of_before(block.message_offsets[first : last + 1].tolist(), window):
            mask = block.mask[start:stop].tolist()
            if any(mask):
                before.append((list(range(start - context, stop)), [0] * context + mask, context))
    assert listed(to_chunks(block, ChunkRule(window, "split", 0.0), Account())) == before


@given(conversations, windows, shares, st.sampled_from(["split", "truncate", "drop"]))
def test_the_account_adds_up(given_: list[list[Said]], window: int, share: float, policy: str) -> None:
    """Messages and tokens are counted once, and a chunk's tokens are those counted in it and those repeated."""
    block, account = block_of(given_), Account()
    chunks = to_chunks(block, ChunkRule(window, policy, share), account)
    account.check()
    flat = [message for conversation in given_ for message in conversation]
    own = [message for message in flat if not message.repeated]
    assert account.messages == len(own)
    assert account.tokens == sum(message.head + message.size for message in own)
    assert (account.tokens_supervised, account.chunks) == (int(chunks.mask.sum()), len(chunks.context))
    assert account.tokens_supervised + account.tokens_masked + account.tokens_repeated == len(chunks.ids)
    assert (account.messages_supervised, account.messages_masked, account.tokens_repeated) == (
        int(chunks.messages_supervised.sum()),
        int(chunks.messages_masked.sum()),
        int(chunks.repeated.sum()),
    )
    held = set(chunks.ids.tolist())
    repeated = np.repeat(block.repeated, np.diff(block.message_offsets))
    assert sum(account.tokens_dropped.values()) == sum(t not in held for t in np.flatnonzero(~repeated).tolist())
    places = [range(a, b) for a, b in pairwise(block.message_offsets.tolist())]
    seen = [
        not m.repeated and not m.supervised and any(t in held for t in p) for m, p in zip(flat, places, strict=True)
    ]
    assert account.messages_masked == sum(seen)
    if policy == "split":
        assert account.tokens_dropped.keys() <= {DROPPED_UNSUPERVISED}
        lone = [
            p for m, p in zip(flat, places, strict=True) if m.supervised and not block.mask[p.start + 1 : p.stop].any()
        ]
        assert account.messages_supervised >= sum(message.supervised for message in own) - len(lone)


def chunked(conversation: list[Said], window: int, share: float) -> tuple[list[tuple[list[int], int]], Account]:
    account = Account(overlong_context=share, seq_length=window)
    chunks = listed(to_chunks(block_of([conversation]), ChunkRule(window, "split", share), account))
    account.check()
    return [(ids, context) for ids, _, context in chunks], account


def test_a_chunk_begins_with_the_system_message_and_the_end_of_the_question() -> None:
    long = [Said(SYSTEM, 1, 7), Said(USER, 1, 99), Said(ASSISTANT, 1, 99, True)]  # from 0, 8 and 108 to 208
    chunks, account = chunked(long, 64, 0.5)
    assert chunks[0] == ([*range(8), 63, *range(64, 119)], 9)  # inside the question, more of which is its own
    assert chunks[1] == ([*range(8), *range(84, 108), 118, *range(119, 150)], 33)
    assert [ids[0] for ids, _ in chunks] == [0] * len(chunks)
    assert (account.answers_without_question, account.answers_with_question_cut) == (0, 1)
    assert account.warnings() == []

    chunks, account = chunked(long, 64, 0.0)
    assert chunks == [(list(range(108, 172)), 0), (list(range(171, 208)), 1)]
    assert (account.answers_without_question, account.answers_with_question_cut) == (1, 0)
    assert account.messages_dropped == {DROPPED_UNSUPERVISED: 2}
    (warning,) = account.warnings()
    assert warning.startswith("1 of 1 answers begin without their question")
    assert "overlong_context" in warning
    assert any(warning in line for line in account.report())


def test_a_question_stays_with_its_answer_where_both_fit() -> None:
    turn = [Said(USER, 1, 19), Said(ASSISTANT, 1, 29, True)]
    chunks, account = chunked(turn * 3, 80, 0.25)
    assert chunks == [(list(range(n * 50, n * 50 + 50)), 0) for n in range(3)]
    assert chunked(turn * 3, 80, 0.0)[1].answers_without_question == 1
    assert account.answers_without_question == account.answers_with_question_cut == account.tokens_repeated == 0


def test_a_system_message_larger_than_the_share_leaves_it_to_the_question() -> None:
    chunks, _ = chunked([Said(SYSTEM, 1, 29), Said(USER, 1, 29), Said(ASSISTANT, 1, 99, True)], 64, 0.25)
    assert chunks[1][0][:16] == list(range(44, 60))


def test_what_another_rendering_accounts_for_is_repeated() -> None:
    """Two renderings of one conversation: every message counted once, the second's context as repeated tokens."""
    first = [Said(USER, 1, 3), Said(ASSISTANT, 1, 4, True)]
    second = [Said(USER, 1, 3, repeated=True), Said(ASSISTANT, 1, 2, repeated=True), Said(USER, 1, 5), first[1]]
    block, account = block_of([first, second])._replace(source=np.zeros(2, dtype=np.int64)), Account()
    chunks = to_chunks(block, ChunkRule(64, "split", 0.25), account)
    account.check()
    assert (account.messages, account.messages_supervised, account.messages_masked) == (4, 2, 2)
    assert (account.tokens, account.tokens_repeated, account.tokens_supervised) == (20, 7, 8)
    assert chunks.repeated.tolist() == [0, 7]
    account = Account()
    to_chunks(block, ChunkRule(16, "drop"), account)
    account.check()
    assert (account.messages, sum(account.messages_dropped.values())) == (4, 2)
    assert (account.overlong_conversations, account.conversations_dropped) == (1, {})


def test_tools_before_the_first_message_are_repeated_like_a_system_message() -> None:
    chunks, _ = chunked([Said(USER, 9, 30), Said(ASSISTANT, 2, 99, True)], 64, 0.25)
    assert chunks[1][0][:16] == [*range(9), *range(32, 39)]


@pytest.mark.parametrize("window", [16, 40])
def test_a_text_has_no_question(window: int) -> None:
    chunks, account = chunked([Said(TEXT, 1, 99, True)], window, 0.5)
    assert [context for _, context in chunks] == [0] + [1] * (len(chunks) - 1)
    assert account.answers_without_question == 0
