"""Attention for a group of heads at a time.

Queries, keys and values of all heads, turned and laid out for a kernel, and their gradients, are what an attention
layer needs most of; here these exist for one group. One buffer holds what is between, the result of the fused
projection: a group's queries in it give way to attention's result, which is what the output projection reads; in the
backward pass that gives way to the queries' gradient, and keys and values give way to theirs. So queries are projected
anew there, for one group at a time, from the layer's normed input; keys and values are still there.

Attention itself runs once forward, whatever kernel computes it: a group's graph is made in the forward pass, and what
autograd would keep of its operands and its result (`saved_tensors_hooks`) are notes of their layout, by which the
backward pass finds them made again. What else a kernel keeps, log-sums, is kept. A gradient of all heads' queries, keys
and values comes out at once, so that the projection's weights have theirs from one product. Where ranks share rows each
group is exchanged by itself, and once more in the backward pass, with attention's result.

Shape suffixes as in transformer.py; n heads of the projection (H + 2 * K), h of a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from lumina.model.parallel.sequence import SequenceGroup


@dataclass(frozen=True)
class HeadGroups:
    """How many `groups`, of `heads` query and key/value heads in all, and what is done for one of them: `project` gives
    these query heads of the layer, (B, S, h, d), anew; `turn` norms and rotates queries and keys; `attend` takes
    queries, keys and values of the whole row. The last two are differentiable; `sequence`: the ranks that share it."""

    groups: int
    heads: tuple[int, int]
    project: Callable[[slice], Tensor]
    turn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    sequence: SequenceGroup | None

    def queries(self, number: int) -> slice:
        """The query heads of a group."""
        count = self.heads[0] // self.groups
        return slice(number * count, (number + 1) * count)

    def slots(self, buffer_BSnd: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where queries, keys and values of a group are."""
        (queries, keys), count = self.heads, self.heads[1] // self.groups
        first = queries + number * count
        places = (self.queries(number), slice(first, first + count), slice(first + keys, first + keys + count))
        q_BShd, k_BShd, v_BShd = (buffer_BSnd[:, :, place] for place in places)
        return q_BShd, k_BShd, v_BShd

    def operands(self, q_BShd: Tensor, k_BShd: Tensor, v_BShd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attention is given."""
        q_BShd, k_BShd = self.turn(q_BShd, k_BShd)
        if self.sequence is not None:
            q_BShd, k_BShd, v_BShd = self.sequence.to_heads(q_BShd, k_BShd, v_BShd)
        return q_BShd, k_BShd, v_BShd

    def result(self, o_BShd: Tensor) -> Tensor:
        """Of what attention gave, this rank's tokens."""
        return o_BShd if self.sequence is None else self.sequence.to_tokens(o_BShd)


def by_head_groups(heads: HeadGroups, qkv_BSnd: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Attention's result (B, S, H, d) of the projection's, whose memory it is given. parameters: those of `turn`."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (qkv_BSnd, *parameters))
    o_BSHd: Tensor = _ByHeadGroups.apply(heads, wanted, qkv_BSnd, *parameters)  # type: ignore[no-untyped-call]
    return o_BSHd


class _ByHeadGroups(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: HeadGroups, wanted: bool, qkv_BSnd: Tensor, *parameters: nn.Parameter) -> Tensor:
        buffer_BSnd = qkv_BSnd.detach()
        graphs = []
        for number in range(heads.groups):
            slots = heads.slots(buffer_BSnd, number)
            if wanted:
                graph, o_BShd = _graph(heads, buffer_BSnd, slots)
                graphs.append(graph)
            else:
                o_BShd = heads.result(heads.attend(*heads.operands(*slots)))
            slots[0].copy_(o_BShd)
        ctx.left = heads, graphs, buffer_BSnd, parameters
        return buffer_BSnd[:, :, : heads.heads[0]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.left is not None, "a graph whose memory is used again runs backward once"
        (heads, graphs, buffer_BSnd, parameters), ctx.left = ctx.left, None
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in wanted]
        for number, graph in enumerate(graphs):
            found = graph.backward(heads, number, buffer_BSnd, grads[0][:, :, heads.queries(number)], wanted)
            for total, gradient in zip(sums, found, strict=True):
                total.add_(gradient)
        of = {id(p): total.to(p.dtype) for p, total in zip(wanted, sums, strict=True)}
        return None, None, buffer_BSnd, *(of.get(id(parameter)) for parameter in parameters)


class _Layout(NamedTuple):
    """Of a tensor that a graph needs: the name of one that is made again, or that has its memory, and how it lies."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # from the beginning of that one


@dataclass
class _Kept:
    """What a graph keeps of one tensor."""

    tensor: Tensor | None
    layout: _Layout | None = None


@dataclass
class _Ends:
    """What a group's graph begins with, in its turn: the operands' values forward, their gradients backward, and what
    is made again for it, while it is needed. A graph holds it, so it must hold no graph."""

    given: tuple[Tensor, ...] = ()
    gradients: tuple[Tensor, ...] = ()
    again: dict[str, Tensor] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)  # how often each of those will be asked for

    def found(self, kept: _Kept) -> Tensor:
        if kept.tensor is not None:
            return kept.tensor
        assert kept.layout is not None
        name, size, stride, offset = kept.layout
        if name not in self.again:
            raise RuntimeError(
                "attention's kernel reads what it saved more often than it saved it: set attention_head_groups to 1"
            )
        self.uses[name] -= 1
        base = self.again[name] if self.uses[name] else self.again.pop(name)
        if name == "projected":  # lies otherwise than the operand did, in whose place attention's result is now
            return base.view(size)
        return base.as_strided(size, stride, base.storage_offset() + offset)


class _Begin(torch.autograd.Function):
    """(token) to queries, keys and values, whose gradients it puts aside: a leaf would hold its value."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, ends: _Ends) -> tuple[Tensor, ...]:
        ctx.ends = ends
        return tuple(x.detach() for x in ends.given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        ctx.ends.gradients = grads
        return None, None


class _Graph(NamedTuple):
    """Attention of one group, between its forward and its backward pass."""

    end: GradientEdge
    token: Tensor
    ends: _Ends
    result: tuple[torch.Size, tuple[int, ...]]  # size and stride of what attention gave

    def backward(
        self, heads: HeadGroups, number: int, buffer_BSnd: Tensor, do_BShd: Tensor, parameters: list[nn.Parameter]
    ) -> list[Tensor]:
        """Put the gradients in the operands' place; returns those of the parameters."""
        o_BShd, k_BShd, v_BShd = slots = heads.slots(buffer_BSnd, number)
        ends, (size, stride) = self.ends, self.result
        projected = heads.project(heads.queries(number))
        operands = heads.operands(projected, k_BShd, v_BShd)
        again = dict(zip(("projected", *"qkv"), (projected, *operands), strict=True))
        if heads.sequence is not None:  # whatever this rank's kernel has kept: another's may be another one
            (o_BShd,) = heads.sequence.to_heads(o_BShd)
        if ends.uses["o"]:
            again["o"] = torch.empty_strided(size, stride, dtype=o_BShd.dtype, device=o_BShd.device).copy_(o_BShd)
        ends.again = {name: tensor for name, tensor in again.items() if ends.uses[name]}
        del projected, operands, o_BShd, again
        found = torch.autograd.grad([self.end], [self.token, *parameters], [do_BShd.contiguous()], allow_unused=True)
        ends.again = {}
        for slot, gradient in zip(slots, ends.gradients, strict=True):
            slot.copy_(gradient)
        ends.gradients = ()
        return list(found[1:])


def _graph(heads: HeadGroups, buffer_BSnd: Tensor, slots: tuple[Tensor, ...]) -> tuple[_Graph, Tensor]:
    """The graph of one group, and attention's result for it."""
    ends, token = _Ends(given=slots), torch.empty(0, device=buffer_BSnd.device, requires_grad=True)
    cells: list[_Kept] = []

    def keep(tensor: Tensor) -> _Kept:
        cells.append(_Kept(tensor))
        return cells[-1]

    with torch.enable_grad(), saved_tensors_hooks(keep, ends.found):
        operands = heads.operands(*_Begin.apply(token, ends))  # type: ignore[no-untyped-call]
        attended = heads.attend(*operands)
        o_BShd = heads.result(attended)
    ends.given = ()
    made = dict(zip("qkvo", (*operands, attended), strict=True))
    for kept in cells:
        _note(kept, made, buffer_BSnd, slots, heads.heads[0])
    ends.uses = Counter(kept.layout.name for kept in cells if kept.layout is not None)
    return _Graph(get_gradient_edge(o_BShd), token, ends, (attended.shape, attended.stride())), o_BShd.detach()


def _note(kept: _Kept, made: dict[str, Tensor], buffer_BSnd: Tensor, slots: tuple[Tensor, ...], queries: int) -> None:
    """Let go of a tensor that can be made again."""
    tensor = kept.tensor
    assert tensor is not None
    memory = tensor.untyped_storage()._cdata
    if memory == buffer_BSnd.untyped_storage()._cdata:
        column = (tensor.storage_offset() - buffer_BSnd.storage_offset()) % buffer_BSnd.stride(1)
        if column >= queries * buffer_BSnd.stride(2):  # of keys and values, which stay there
            return
        if _same_place(tensor, slots[0]):
            kept.tensor, kept.layout = None, _Layout("projected", tensor.shape, tensor.stride(), 0)
        else:  # where attention's result will be
            kept.tensor = tensor.clone()
        return
    for name, base in made.items():
        offset = int(tensor.storage_offset() - base.storage_offset())
        # Of a result that is a part of what a kernel saves (heads filled up to a width that it takes) the part alone
        # can be made again.
        if memory == base.untyped_storage()._cdata and offset >= 0 and offset + _extent(tensor) <= _extent(base):
            kept.tensor, kept.layout = None, _Layout(name, tensor.shape, tensor.stride(), offset)
            return


def _extent(x: Tensor) -> int:
    """How many numbers of memory lie between the first and the last of a tensor, both counted."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _same_place(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one memory are the same but for axes of length 1."""
    of = [(x.storage_offset(), x.squeeze().shape, x.squeeze().stride()) for x in (a, b)]
    return of[0] == of[1]
