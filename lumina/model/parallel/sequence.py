"""Sequence parallelism by all-to-all over heads (DeepSpeed-Ulysses, arXiv:2309.14509).

P ranks hold a row's tokens in equal parts, in their order. All but attention works on single tokens, and so on a part.
Around attention the parts are exchanged: before it from all heads of T tokens to a Pth of the heads of all P * T, so
that each rank attends as one process would, over whole documents; after it back. An exchange moves what each rank has
for each other one, and its gradient goes the way back: the same exchange. Queries, keys and values travel together.

Where P does not divide the K key/value heads they are repeated, to the smallest number that it divides: rank p then has
the query heads [p * H / P, (p + 1) * H / P) and the very key/value heads that serve these. The gradients of copies add
up where they were made.

Bytes that leave a rank, per token of its own and layer, in the forward pass and again in the backward pass: of d * (H +
2 * K' + H) numbers the share (P - 1) / P; K' is K, repeated as above. docs/long-context.md has examples.

T tokens of a rank, P ranks, n heads of a rank (queries, keys, values), d head width; H and K as in transformer.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(eq=False)
class SequenceGroup:
    """The ranks that share a row's tokens. index: this rank's place among them, and its part's in the row; size: how
    many they are; group: their process group; exchanging: made around each collective, with the bytes by it that leave
    this rank, for a clock."""

    index: int
    size: int
    group: dist.ProcessGroup
    exchanging: Callable[[int], AbstractContextManager[None]] = lambda sent: nullcontext()

    @property
    def first(self) -> bool:
        """Whether this rank holds the beginning of the row. What is the same on all ranks of the group counts here."""
        return self.index == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the group's ranks, in place; not for autograd."""
        with self.exchanging(2 * self._to_others(values)):
            dist.all_reduce(values, group=self.group)
        return values

    def _to_others(self, values: Tensor) -> int:
        """Bytes of `values` that are not for this rank itself, of parts as large for each."""
        return values.nbytes * (self.size - 1) // self.size

    def attend(
        self,
        attention: Callable[[Tensor, Tensor, Tensor], Tensor],
        q_1THd: Tensor,
        k_1TKd: Tensor,
        v_1TKd: Tensor,
    ) -> Tensor:
        """attention(q, k, v) of the whole row, at this rank's tokens: (1, T, H, d). `attention` is called with the
        whole row's tokens and this rank's heads. Collective over the group, backward too."""
        return self.to_tokens(attention(*self.to_heads(q_1THd, k_1TKd, v_1TKd)))

    def to_heads(self, *x_1Tnd: Tensor) -> tuple[Tensor, ...]:
        """Of each, this rank's heads at the whole row's tokens, (1, P * T, n / P, d), in one exchange. Heads that P
        does not divide are repeated."""
        size, length, width = self.size, x_1Tnd[0].shape[1], x_1Tnd[0].shape[3]
        parts_PTnd = [_repeated(x, size).reshape(length, size, -1, width).transpose(0, 1) for x in x_1Tnd]
        whole_Snd = self._exchange(torch.cat(parts_PTnd, 2)).flatten(0, 1)
        return torch.split(whole_Snd[None], [part.shape[2] for part in parts_PTnd], 2)

    def to_tokens(self, x_1Snd: Tensor) -> Tensor:
        """All heads at this rank's tokens, (1, T, P * n, d): what `to_heads` does, back."""
        _, tokens, heads, width = x_1Snd.shape
        parts_PTnd = self._exchange(x_1Snd.reshape(self.size, tokens // self.size, heads, width))
        return parts_PTnd.transpose(0, 1).reshape(1, tokens // self.size, self.size * heads, width)

    def _exchange(self, parts_P: Tensor) -> Tensor:
        """What every rank of the group has for this one, in their order; `parts_P[p]`: what this one has for rank p."""
        found: Tensor = _Exchange.apply(parts_P, self)  # type: ignore[no-untyped-call]
        return found


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts_P: Tensor, sequence: SequenceGroup) -> Tensor:
        ctx.sequence = sequence
        return _all_to_all(parts_P, sequence)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grads[0], ctx.sequence), None


def _all_to_all(parts_P: Tensor, sequence: SequenceGroup) -> Tensor:
    given = parts_P.contiguous()
    found = torch.empty_like(given)
    with sequence.exchanging(sequence._to_others(given)):
        dist.all_to_all_single(found, given, group=sequence.group)
    return found


def _repeated(x_1TKd: Tensor, size: int) -> Tensor:
    """Key/value heads, each repeated where it stands, so that `size` divides their number."""
    heads = x_1TKd.shape[2]
    times = size // math.gcd(heads, size)
    return x_1TKd if times == 1 else x_1TKd.repeat_interleave(times, 2)


_groups: dict[int, tuple[dist.ProcessGroup | None, SequenceGroup]] = {}  # with the default group of their time


def sequence_group(size: int) -> SequenceGroup | None:
    """This rank's group where `size` neighbouring ranks share each row's tokens; None for 1. Collective over all ranks,
    whose number `size` divides. They are made once for each size and default process group, and none is given back: a
    program may have destroyed the default group, and these with it, and joined another."""
    if size == 1:
        return None
    default = dist.group.WORLD
    if size not in _groups or _groups[size][0] is not default:
        rank, world = dist.get_rank(), dist.get_world_size()
        assert world % size == 0
        for start in range(0, world, size):  # every rank makes every group
            group = dist.new_group(list(range(start, start + size)))
            if start <= rank < start + size:
                _groups[size] = default, SequenceGroup(rank - start, size, group)
    return _groups[size][1]
