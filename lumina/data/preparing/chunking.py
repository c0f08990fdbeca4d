"""Rendered conversations -> pieces of at most `window` tokens, and the account of what that does to each message.

`split` cuts at message boundaries; a message longer than the window begins a piece of its own and is cut at the
window. A piece that begins inside a message repeats one token before it, as context: the first token of a piece has
nothing to be predicted from, so without it one token of every cut would never be learned. Every learned token is
therefore a target exactly once.

`truncate` keeps the first window of an overlong conversation, `drop` none of it.

Shapes: T tokens, M messages, N conversations, P pieces.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.chat import RenderedBlock
from lumina.data.account import Account

POLICIES = ("split", "truncate", "drop")
MIN_WINDOW = 16  # below that a piece could hold a message's control tokens and nothing to learn

DROPPED_OVERLONG = "longer than the window (overlong: drop)"
DROPPED_TRUNCATED = "past the window (overlong: truncate)"

Int64 = NDArray[np.int64]


class Pieces(NamedTuple):
    """P pieces one after another.

    ids_T int32, mask_T uint8, offsets int64[P+1]; conversation_P int64 (index in the block); context_P bool, whether
    the first token is repeated context; trained_P, masked_P int64, how many messages begin in it that are learned from,
    or are context.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    offsets: Int64
    conversation: Int64
    context: NDArray[np.bool_]
    trained: Int64
    masked: Int64


def ranges(starts: Int64, stops: Int64) -> Int64:
    """The indices of all [start, stop) one range after another."""
    lengths = stops - starts
    first = np.cumsum(lengths) - lengths
    return np.repeat(starts - first, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)


def split_points(message_offsets: list[int], window: int) -> list[tuple[int, int, int]]:
    """Cuts one conversation: (start, stop, context) of each piece, in the offsets' own numbering."""
    pieces: list[tuple[int, int, int]] = []
    start, context = message_offsets[0], 0
    for begin, end in pairwise(message_offsets):
        if end - start + context <= window:
            continue
        if begin > start:
            pieces.append((start, begin, context))
            start, context = begin, 0
        while end - start + context > window:
            stop = start + window - context
            pieces.append((start, stop, context))
            start, context = stop, 1
    pieces.append((start, message_offsets[-1], context))
    return pieces


def cut(block: RenderedBlock, window: int, policy: str, account: Account) -> Pieces:
    """Cuts a block of conversations and enters every message and token of it into `account`."""
    assert window >= MIN_WINDOW
    assert policy in POLICIES
    bounds = block.message_offsets[block.conversation_offsets]
    sizes_N = np.diff(bounds)
    long_N = np.flatnonzero(sizes_N > window)
    account.messages += len(block.learned)
    account.tokens += len(block.ids)
    account.overlong_conversations += len(long_N)

    whole_N = np.flatnonzero(sizes_N <= window)
    start, stop = bounds[whole_N], bounds[whole_N + 1]
    context = np.zeros(len(whole_N), dtype=np.int64)
    if policy == "split":
        cuts: list[tuple[int, int, int]] = []
        for n in long_N:
            first, last = block.conversation_offsets[n], block.conversation_offsets[n + 1]
            cuts += split_points(block.message_offsets[first : last + 1].tolist(), window)
        more = np.array(cuts, dtype=np.int64).reshape(-1, 3)
        account.cut_messages += len(np.unique(np.searchsorted(block.message_offsets, more[more[:, 2] == 1, 0])))
    elif policy == "truncate":
        more = np.stack([bounds[long_N], bounds[long_N] + window, np.zeros_like(long_N)], axis=1)
    else:
        more = np.empty((0, 3), dtype=np.int64)
    start, stop, context = (np.concatenate([a, b]) for a, b in zip((start, stop, context), more.T, strict=True))
    order = np.argsort(start)
    start, stop, context = start[order], stop[order], context[order]
    trained_M, masked_M = _enter(block, bounds, long_N, policy, account)
    pieces = _gather(block, bounds, start, stop, context, trained_M, masked_M)
    learned_tokens, repeated = int(pieces.mask.sum(dtype=np.int64)), int(context.sum())
    account.tokens_trained += learned_tokens
    account.tokens_masked += len(pieces.ids) - repeated - learned_tokens
    account.tokens_repeated += repeated
    account.pieces += len(context)
    return pieces


def _gather(
    block: RenderedBlock,
    bounds: Int64,
    start: Int64,
    stop: Int64,
    context: Int64,
    trained_M: NDArray[np.bool_],
    masked_M: NDArray[np.bool_],
) -> Pieces:
    """Copies the pieces' tokens out of the block; a repeated context token is never learned."""
    index_T = ranges(start - context, stop)
    offsets = np.zeros(len(start) + 1, dtype=np.int64)
    np.cumsum(stop - start + context, out=offsets[1:])
    mask_T = block.mask[index_T]
    mask_T[offsets[:-1][context == 1]] = 0
    conversation = np.searchsorted(bounds, start, side="right") - 1
    low, high = (np.searchsorted(block.message_offsets[:-1], place) for place in (start, stop))
    begun = [np.concatenate([[0], np.cumsum(of_M)]) for of_M in (trained_M, masked_M)]
    trained, masked = (before[high] - before[low] for before in begun)
    return Pieces(block.ids[index_T], mask_T, offsets, conversation, context == 1, trained, masked)


def _enter(
    block: RenderedBlock, bounds: Int64, long_N: Int64, policy: str, account: Account
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Enters each message as trained, masked or dropped, and the dropped tokens. Returns trained_M and masked_M."""
    sizes_M = np.diff(block.message_offsets)
    kept_M = sizes_M
    if policy != "split":
        end_N = bounds[1:].copy()
        end_N[long_N] = bounds[long_N] + (account.window if policy == "truncate" else 0)
        end_M = np.repeat(end_N, np.diff(block.conversation_offsets))
        kept_M = np.clip(end_M - block.message_offsets[:-1], 0, sizes_M)
    # An answer of which only control tokens are left teaches nothing: it counts as dropped.
    trained_M = block.learned & (kept_M > block.head)
    masked_M = ~block.learned & (kept_M > 0)
    account.messages_trained += int(trained_M.sum())
    account.messages_masked += int(masked_M.sum())
    if policy != "split":
        reason = DROPPED_OVERLONG if policy == "drop" else DROPPED_TRUNCATED
        account.drop_messages(reason, int((~trained_M & ~masked_M).sum()))
        account.drop_tokens(reason, int((sizes_M - kept_M).sum()))
    if policy == "drop":
        account.drop_conversations(DROPPED_OVERLONG, len(long_N))
    if policy == "truncate":
        account.cut_messages += int(((kept_M > 0) & (kept_M < sizes_M)).sum())
    return trained_M, masked_M
