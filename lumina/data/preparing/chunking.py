"""Overlong conversations: rendered conversations -> chunks of at most `seq_length` tokens, every message and token of
them counted.

`split` splits at message boundaries; a message longer than `seq_length` begins a chunk of its own and is split every
`seq_length` tokens. A chunk that begins inside a message repeats one token before it, as context: the first token of a
chunk has nothing to be predicted from, so without it one token of every split would never be supervised. Every
supervised token is therefore a target exactly once.

`truncate` keeps the first `seq_length` tokens of an overlong conversation, `drop` none of it.

Shapes: T tokens, M messages, N conversations, C chunks.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lumina.chat import RenderedBlock
from lumina.data.account import DROPPED_OVERLONG, DROPPED_TRUNCATED, Account
from lumina.data.cache.chunks import Chunks, Int64, ranges

POLICIES = ("split", "truncate", "drop")
MIN_SEQ_LENGTH = 16  # below that a chunk could hold a message's special tokens and nothing to supervise


def split_points(message_offsets: list[int], seq_length: int) -> list[tuple[int, int, int]]:
    """(start, stop, context) of each chunk of one conversation, in the offsets' own numbering."""
    chunks: list[tuple[int, int, int]] = []
    start, context = message_offsets[0], 0
    for begin, end in pairwise(message_offsets):
        if end - start + context <= seq_length:
            continue
        if begin > start:
            chunks.append((start, begin, context))
            start, context = begin, 0
        while end - start + context > seq_length:
            stop = start + seq_length - context
            chunks.append((start, stop, context))
            start, context = stop, 1
    chunks.append((start, message_offsets[-1], context))
    return chunks


def to_chunks(block: RenderedBlock, seq_length: int, policy: str, account: Account) -> Chunks:
    """The chunks of a block of conversations; every message and token of it is entered into `account`."""
    assert seq_length >= MIN_SEQ_LENGTH
    assert policy in POLICIES
    bounds = block.message_offsets[block.conversation_offsets]
    sizes_N = np.diff(bounds)
    long_N = np.flatnonzero(sizes_N > seq_length)
    account.messages += len(block.supervised)
    account.tokens += len(block.ids)
    account.overlong_conversations += len(long_N)

    whole_N = np.flatnonzero(sizes_N <= seq_length)
    start, stop = bounds[whole_N], bounds[whole_N + 1]
    context = np.zeros(len(whole_N), dtype=np.int64)
    if policy == "split":
        splits: list[tuple[int, int, int]] = []
        for n in long_N:
            first, last = block.conversation_offsets[n], block.conversation_offsets[n + 1]
            splits += split_points(block.message_offsets[first : last + 1].tolist(), seq_length)
        more = np.array(splits, dtype=np.int64).reshape(-1, 3)
        account.cut_messages += len(np.unique(np.searchsorted(block.message_offsets, more[more[:, 2] == 1, 0])))
    elif policy == "truncate":
        more = np.stack([bounds[long_N], bounds[long_N] + seq_length, np.zeros_like(long_N)], axis=1)
    else:
        more = np.empty((0, 3), dtype=np.int64)
    start, stop, context = (np.concatenate([a, b]) for a, b in zip((start, stop, context), more.T, strict=True))
    order = np.argsort(start)
    start, stop, context = start[order], stop[order], context[order]
    supervised_M, masked_M = _count_messages(block, bounds, long_N, policy, account)
    chunks = _gather(block, bounds, start, stop, context, supervised_M, masked_M)
    supervised_tokens, repeated = int(chunks.mask.sum(dtype=np.int64)), int(context.sum())
    account.tokens_supervised += supervised_tokens
    account.tokens_masked += len(chunks.ids) - repeated - supervised_tokens
    account.tokens_repeated += repeated
    account.chunks += len(context)
    return chunks


def _gather(
    block: RenderedBlock,
    bounds: Int64,
    start: Int64,
    stop: Int64,
    context: Int64,
    supervised_M: NDArray[np.bool_],
    masked_M: NDArray[np.bool_],
) -> Chunks:
    """Copies the chunks' tokens out of the block; a repeated context token is never supervised."""
    index_T = ranges(start - context, stop)
    offsets = np.zeros(len(start) + 1, dtype=np.int64)
    np.cumsum(stop - start + context, out=offsets[1:])
    mask_T = block.mask[index_T]
    mask_T[offsets[:-1][context == 1]] = 0
    conversation = np.searchsorted(bounds, start, side="right") - 1
    low, high = (np.searchsorted(block.message_offsets[:-1], place) for place in (start, stop))
    begun = [np.concatenate([[0], np.cumsum(of_M)]) for of_M in (supervised_M, masked_M)]
    supervised, masked = (before[high] - before[low] for before in begun)
    return Chunks(block.ids[index_T], mask_T, offsets, conversation, context == 1, supervised, masked)


def _count_messages(
    block: RenderedBlock, bounds: Int64, long_N: Int64, policy: str, account: Account
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Updates the account's counts of messages and dropped tokens; returns the supervised and the context messages:
    bool[M] each, a message in neither was dropped."""
    sizes_M = np.diff(block.message_offsets)
    kept_M = sizes_M
    if policy != "split":
        end_N = bounds[1:].copy()
        end_N[long_N] = bounds[long_N] + (account.seq_length if policy == "truncate" else 0)
        end_M = np.repeat(end_N, np.diff(block.conversation_offsets))
        kept_M = np.clip(end_M - block.message_offsets[:-1], 0, sizes_M)
    # An answer of which only special tokens are left teaches nothing: it counts as dropped.
    supervised_M = block.supervised & (kept_M > block.head)
    masked_M = ~block.supervised & (kept_M > 0)
    account.messages_supervised += int(supervised_M.sum())
    account.messages_masked += int(masked_M.sum())
    if policy != "split":
        reason = DROPPED_OVERLONG if policy == "drop" else DROPPED_TRUNCATED
        account.drop_messages(reason, int((~supervised_M & ~masked_M).sum()))
        account.drop_tokens(reason, int((sizes_M - kept_M).sum()))
    if policy == "drop":
        account.drop_conversations(DROPPED_OVERLONG, len(long_N))
    if policy == "truncate":
        account.cut_messages += int(((kept_M > 0) & (kept_M < sizes_M)).sum())
    return supervised_M, masked_M
