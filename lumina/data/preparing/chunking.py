"""Rendered conversations -> chunks of at most `seq_length` tokens, every message and token of them counted.

A conversation that fits is a chunk. Of a longer one `split` makes several (lumina.data.preparing.splitting), in which
every supervised token is a target exactly once; `truncate` keeps the first `seq_length` tokens, `drop` none.

A chunk without a supervised token would teach nothing: it is dropped and counted.

A token is counted once, however many chunks hold it: as what it is where it stands among a chunk's own tokens, else in
the first chunk that has it as context. All other times it is repeated. So do messages, where their first token counts.
Messages that another rendering of the same conversation accounts for (RenderedBlock.repeated) are repeated everywhere.

Shapes: T tokens, M messages, N conversations, C chunks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lumina.chat import RenderedBlock
from lumina.data.account import DROPPED_OVERLONG, DROPPED_TRUNCATED, DROPPED_UNSUPERVISED, Account
from lumina.data.cache.chunks import Chunks, Int64, ranges
from lumina.data.preparing.splitting import Overlong, Part

POLICIES = ("split", "truncate", "drop")
MIN_SEQ_LENGTH = 16  # below that a chunk could hold a message's special tokens and nothing to supervise


class ChunkRule(NamedTuple):
    """How conversations become chunks. `policy`: one of POLICIES; `context`: the share of `seq_length` that the system
    message and the end of the question may take of a chunk after the first."""

    seq_length: int
    policy: str
    context: float = 0.0

    @property
    def budget(self) -> int:
        """The most tokens of context, but for the one before a message that goes on."""
        return int(self.context * self.seq_length)


def to_chunks(block: RenderedBlock, rule: ChunkRule, account: Account) -> Chunks:
    """The chunks of a block of conversations; every message and token of it is entered into `account`."""
    assert rule.seq_length >= MIN_SEQ_LENGTH
    assert rule.policy in POLICIES
    bounds = block.message_offsets[block.conversation_offsets]
    long_N = np.flatnonzero(np.diff(bounds) > rule.seq_length)
    account.overlong_conversations += len(set(block.source[long_N].tolist()))
    parts = _plain(bounds[:-1], bounds[1:])
    teaching_N = _teaches(block.mask, parts)
    if teaching_N.all() and not (len(long_N) or block.repeated.any() or block.mask[bounds[:-1]].any()):
        return _whole(block, bounds, account)
    teaching_N[long_N] = False
    parts = np.concatenate([parts[teaching_N], _parts(block, bounds, long_N, rule, account)])
    parts = parts[np.argsort(parts[:, _START], kind="stable")]
    chunks = _gather(block, bounds, parts)
    _count(block, bounds, long_N, rule, parts, chunks, account)
    return chunks


def _teaches(mask_T: NDArray[np.uint8], parts: Int64) -> NDArray[np.bool_]:
    """Which chunks without context have a target: bool[C]. Their first token has nothing to be predicted from."""
    if not len(parts):
        return np.zeros(0, dtype=np.bool_)
    start, stop = parts[:, _START] + 1, parts[:, _STOP]
    padded_T = np.append(mask_T, np.zeros(2, dtype=np.uint8))
    found = np.maximum.reduceat(padded_T, np.stack([start, stop], 1).ravel())[::2]
    return (found > 0) & (start < stop)  # of no values, reduceat gives the one where they would begin


def _whole(block: RenderedBlock, bounds: Int64, account: Account) -> Chunks:
    """Every conversation is a chunk as it is."""
    count = len(bounds) - 1
    before = np.concatenate([[0], np.cumsum(block.supervised)])
    supervised_N, all_N = np.diff(before[block.conversation_offsets]), np.diff(block.conversation_offsets)
    none_N = np.zeros(count, dtype=np.int64)
    supervised = int(np.count_nonzero(block.mask))
    account.messages += len(block.supervised)
    account.messages_supervised += int(before[-1])
    account.messages_masked += len(block.supervised) - int(before[-1])
    account.tokens += len(block.ids)
    account.tokens_supervised += supervised
    account.tokens_masked += len(block.ids) - supervised
    account.chunks += count
    masked_N = all_N - supervised_N
    return Chunks(block.ids, block.mask, bounds, np.arange(count), none_N, none_N, supervised_N, masked_N)


_START, _STOP = Part._fields.index("start"), Part._fields.index("stop")


def _parts(block: RenderedBlock, bounds: Int64, long_N: Int64, rule: ChunkRule, account: Account) -> Int64:
    """The chunks of overlong conversations as places in the block: int64[C, 7], the fields of Part."""
    if rule.policy == "truncate" and len(long_N):
        parts = _plain(bounds[long_N], bounds[long_N] + rule.seq_length)
        return parts[_teaches(block.mask, parts)]
    if rule.policy == "split":
        flat = _split(block, long_N, rule, account)
        return np.fromiter(flat, dtype=np.int64, count=len(flat)).reshape(-1, len(Part._fields))
    return np.empty((0, len(Part._fields)), dtype=np.int64)


def _plain(start: Int64, stop: Int64) -> Int64:
    """Chunks without context."""
    return np.stack([start] * 4 + [np.zeros_like(start), start, stop], axis=1)


def _split(block: RenderedBlock, long_N: Int64, rule: ChunkRule, account: Account) -> list[int]:
    """The chunks of these conversations of the block, the fields of one Part after another."""
    if not len(long_N):
        return []
    parts: list[int] = []
    mask, roles, repeated = block.mask.tobytes(), block.role.tobytes(), block.repeated.tobytes()  # a byte for each
    assert len(roles) == len(repeated) == len(block.head)
    offsets, heads = block.message_offsets.tolist(), block.head.tolist()
    firsts, lasts = block.conversation_offsets[long_N].tolist(), block.conversation_offsets[long_N + 1].tolist()
    for first, last in zip(firsts, lasts, strict=True):
        own = slice(first, last)
        overlong = Overlong(offsets[first : last + 1], roles[own], heads[own], repeated[own], mask)
        split = overlong.split(rule.seq_length, rule.budget)
        account.cut_messages += split.cut
        account.answers_without_question += split.without_question
        account.answers_with_question_cut += split.question_cut
        parts += split.parts
    return parts


def _context(parts: Int64) -> Int64:
    """Tokens of context of each chunk: int64[C]."""
    opening, opening_stop, question, question_stop, lead_C, _, _ = parts.T
    context_C: Int64 = opening_stop - opening + question_stop - question + lead_C
    return context_C


def _gather(block: RenderedBlock, bounds: Int64, parts: Int64) -> Chunks:
    """Copies the chunks' tokens out of the block, context first, which is never supervised; the counts are for
    `_count` to fill in."""
    opening, opening_stop, question, question_stop, lead_C, start, stop = parts.T
    starts = np.stack([opening, question, start - lead_C], axis=1).ravel()
    stops = np.stack([opening_stop, question_stop, stop], axis=1).ravel()
    context_C = _context(parts)
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum(context_C + stop - start, out=offsets[1:])
    ids_T, mask_T = _copies(starts, stops, block.ids, block.mask)
    mask_T[ranges(offsets[:-1], offsets[:-1] + context_C)] = 0
    mask_T[offsets[:-1]] = 0
    conversation = np.searchsorted(bounds, start, side="right") - 1
    none_C = np.zeros((3, len(parts)), dtype=np.int64)
    return Chunks(ids_T, mask_T, offsets, conversation, context_C, *none_C)


def _copies(starts: Int64, stops: Int64, *arrays: NDArray[Any]) -> list[NDArray[Any]]:
    """The places [start, stop) of each array one after another, as few copies as there are gaps between them: by index
    it would take five times as long."""
    filled = starts < stops
    starts, stops = starts[filled], stops[filled]
    apart = starts[1:] != stops[:-1]
    firsts = starts[np.concatenate([[True], apart])[: len(starts)]].tolist()
    lasts = stops[np.concatenate([apart, [True]])[: len(stops)]].tolist()
    places = [slice(first, last) for first, last in zip(firsts, lasts, strict=True)]
    return [np.concatenate([array[:0], *map(array.__getitem__, places)]) for array in arrays]


def _count(
    block: RenderedBlock,
    bounds: Int64,
    long_N: Int64,
    rule: ChunkRule,
    parts: Int64,
    chunks: Chunks,
    account: Account,
) -> None:
    """Fills in the chunks' counts and enters messages and tokens into the account."""
    count, own_M = len(parts), ~block.repeated
    counted_T, counted_C, home_M = _counted(block, parts)
    target_T = counted_T & (block.mask > 0)
    target_T[parts[chunks.context == 0, _START]] = False
    # A supervised message needs one target; another one, a token in some chunk.
    first_M = block.message_offsets[:-1]
    supervised_M = own_M & block.supervised & np.logical_or.reduceat(target_T, first_M)
    masked_M = own_M & ~block.supervised & np.logical_or.reduceat(counted_T, first_M)
    chunks.repeated[:] = np.diff(chunks.offsets) - counted_C
    chunks.messages_supervised[:] = np.bincount(home_M[supervised_M], minlength=count)
    chunks.messages_masked[:] = np.bincount(home_M[masked_M], minlength=count)

    counted, supervised = int(counted_C.sum()), int(np.count_nonzero(chunks.mask))
    account.messages += int(own_M.sum())
    account.messages_supervised += int(supervised_M.sum())
    account.messages_masked += int(masked_M.sum())
    account.tokens += int(np.diff(block.message_offsets)[own_M].sum())
    account.tokens_supervised += supervised
    account.tokens_masked += counted - supervised
    account.tokens_repeated += len(chunks.ids) - counted
    account.chunks += count
    _count_dropped(block, bounds, long_N, rule, own_M & ~supervised_M & ~masked_M, counted, account)
    _count_conversations(block, long_N, rule, chunks, account)


def _counted(block: RenderedBlock, parts: Int64) -> tuple[NDArray[np.bool_], Int64, Int64]:
    """Which tokens are counted in some chunk (bool[T]), how many in each (int64[C]), and the chunk in which each
    message is counted (int64[M], of those that are)."""
    count, start, stop = len(parts), parts[:, _START], parts[:, _STOP]
    counted_T = _between(start, stop, len(block.ids))  # among a chunk's own tokens
    counted_C = stop - start
    extra, extra_C = _context_alone(parts, counted_T)
    counted_T[extra] = True
    if block.repeated.any():
        own_T = np.repeat(~block.repeated, np.diff(block.message_offsets))
        counted_T &= own_T
        before = np.concatenate([[0], np.cumsum(own_T, dtype=np.int64)])
        counted_C = before[stop] - before[start]
        extra, extra_C = extra[own_T[extra]], extra_C[own_T[extra]]
    first_M, last_M = block.message_offsets[:-1], block.message_offsets[1:]
    home_M = np.minimum(np.searchsorted(stop, first_M, side="right"), max(0, count - 1))
    if len(extra):  # of messages that are context and nothing else, the first chunk that has them
        place_M = np.minimum(np.searchsorted(extra, first_M), len(extra) - 1)
        home_M = np.where(start[home_M] < last_M, home_M, extra_C[place_M])
    return counted_T, counted_C + np.bincount(extra_C, minlength=count), home_M


def _between(start: Int64, stop: Int64, tokens: int) -> NDArray[np.bool_]:
    """Which of so many tokens lie in [start, stop) of one of C ranges in order: bool[tokens]."""
    edges = np.concatenate([[0], np.stack([start, stop], 1).ravel(), [tokens]])
    return np.repeat(np.arange(len(edges) - 1) % 2 == 1, np.diff(edges))


def _context_alone(parts: Int64, own_T: NDArray[np.bool_]) -> tuple[Int64, Int64]:
    """The tokens, ascending, that are context of chunks and no chunk's own, and the first chunk that has each."""
    opening, opening_stop, question, question_stop, lead_C, start, _ = parts.T
    starts = np.stack([opening, question, start - lead_C], 1).ravel()
    stops = np.stack([opening_stop, question_stop, start], 1).ravel()
    index = ranges(starts, stops)
    missing = ~own_T[index]
    if not missing.any():
        return index[:0], index[:0]
    chunk = np.repeat(np.arange(len(parts)).repeat(3), stops - starts)
    found, first = np.unique(index[missing], return_index=True)
    return found, chunk[missing][first]


def _count_dropped(
    block: RenderedBlock,
    bounds: Int64,
    long_N: Int64,
    rule: ChunkRule,
    dropped_M: NDArray[np.bool_],
    counted: int,
    account: Account,
) -> None:
    """Enters the messages `dropped_M` and all tokens but the `counted` ones, each with its reason: the policy's where
    it leaves nothing of them, else that they lie in a chunk without a supervised token."""
    sizes_M = np.diff(block.message_offsets)
    own_M = ~block.repeated
    kept_M = sizes_M  # what the policy leaves of each
    if rule.policy != "split":
        end_N = bounds[1:].copy()
        end_N[long_N] = bounds[long_N] + (rule.seq_length if rule.policy == "truncate" else 0)
        end_M = np.repeat(end_N, np.diff(block.conversation_offsets))
        kept_M = np.clip(end_M - block.message_offsets[:-1], 0, sizes_M)
        if rule.policy == "truncate":
            account.cut_messages += int((own_M & (kept_M > 0) & (kept_M < sizes_M)).sum())
    # An answer of which only special tokens are left teaches nothing: it counts as dropped.
    past_M = (kept_M < sizes_M) & (kept_M <= np.where(block.supervised, block.head, 0))
    reason = DROPPED_OVERLONG if rule.policy == "drop" else DROPPED_TRUNCATED
    account.drop_messages(reason, int((dropped_M & past_M).sum()))
    account.drop_messages(DROPPED_UNSUPERVISED, int((dropped_M & ~past_M).sum()))
    past = int((sizes_M - kept_M)[own_M].sum())
    account.drop_tokens(reason, past)
    account.drop_tokens(DROPPED_UNSUPERVISED, int(sizes_M[own_M].sum()) - counted - past)


def _count_conversations(
    block: RenderedBlock, long_N: Int64, rule: ChunkRule, chunks: Chunks, account: Account
) -> None:
    """Enters the conversations of which no chunk is left."""
    gone = set(block.source.tolist()) - set(block.source[chunks.conversation].tolist())
    overlong = len(gone.intersection(block.source[long_N].tolist())) if rule.policy == "drop" else 0
    account.drop_conversations(DROPPED_OVERLONG, overlong)
    account.drop_conversations(DROPPED_UNSUPERVISED, len(gone) - overlong)
