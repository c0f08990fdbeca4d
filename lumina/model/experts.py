"""Mixture of experts: a feed-forward layer that is many, of which each token goes through a few. Dropless: every token
reaches the experts that its router chose, however many others did (arXiv:2211.15841).

The experts' matrices are stacked into one parameter for each product, (E, O, I). So ZeRO-3 gathers them whole, and no
rank ever skips one: an expert without a token has a gradient of zeros.

Shape suffixes: T tokens, D hidden width, E experts, K experts a token, R = T * K rows sorted by expert, I inputs and O
outputs of a product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.config import ModelConfig
from lumina.model import ops
from lumina.model.routing import DocumentMembers, Routed


def draw(weight: Tensor, std: float) -> None:
    """Fill with draws from N(0, std^2). A tensor without memory (device meta) is left alone: drawing for it would
    import torch's compiler, four seconds, and every command that uses a trained model makes one."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


# --- Grouped products -----------------------------------------------------------------------------

_ALIGNED = 8  # elements of bfloat16: torch's grouped product takes rows of whole 16 bytes
_FUSED = (9, 10)  # compute capabilities (major) for which torch has a kernel of it


def in_one_launch(x_RI: Tensor, weight_EOI: Tensor) -> bool:
    """Whether torch's grouped product takes these in one launch: in bfloat16, on compute capability 9 and 10. On other
    GPUs, and on ROCm, it takes them too, but by a loop on the host that asks the device where each group ends (torch
    2.13, _grouped_mm_fallback of ATen/native/GroupedMMUtils.h): no faster than ours, and no CUDA graph can hold it."""
    whole = x_RI.shape[1] % _ALIGNED == 0 and weight_EOI.shape[1] % _ALIGNED == 0
    if not (x_RI.is_cuda and x_RI.dtype is torch.bfloat16 and weight_EOI.dtype is torch.bfloat16 and whole):
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(x_RI.device)[0] in _FUSED


class _GroupedProduct(torch.autograd.Function):
    """The weight is saved as the parameter that it is, which ZeRO-3 takes away after the forward pass and brings back
    before the backward pass; torch's own gradient of the grouped product would keep a transposed view of it."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, at_once: bool) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EOI, ends_E)
        ctx.at_once = at_once
        if at_once:
            return F.grouped_mm(x_RI, weight_EOI.mT, offs=ends_E)
        y_RO = x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])
        for expert, rows in _groups(ends_E):
            torch.mm(x_RI[rows], weight_EOI[expert].T, out=y_RO[rows])
        return y_RO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, weight_EOI, ends_E = ctx.saved_tensors
        dy_RO = grads[0].contiguous()
        make = _gradients_at_once if ctx.at_once else _gradients_by_expert
        return *make(dy_RO, x_RI, weight_EOI, ends_E, *ctx.needs_input_grad[:2]), None, None


def _gradients_at_once(
    dy_RO: Tensor, x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    dx_RI = F.grouped_mm(dy_RO, weight_EOI, offs=ends_E) if need_x else None
    if not need_weight:
        return dx_RI, None
    dweight_EOI = F.grouped_mm(dy_RO.mT, x_RI, offs=ends_E)
    # An expert without a token is a product over nothing, whose result torch does not promise to be zeros.
    idle_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
    return dx_RI, dweight_EOI.masked_fill_(idle_E[:, None, None], 0.0)


def _gradients_by_expert(
    dy_RO: Tensor, x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    dx_RI = torch.empty_like(x_RI) if need_x else None
    dweight_EOI = torch.zeros_like(weight_EOI) if need_weight else None
    for expert, rows in _groups(ends_E):
        if dx_RI is not None:
            torch.mm(dy_RO[rows], weight_EOI[expert], out=dx_RI[rows])
        if dweight_EOI is not None:
            torch.mm(dy_RO[rows].T, x_RI[rows], out=dweight_EOI[expert])
    return dx_RI, dweight_EOI


def _groups(ends_E: Tensor) -> list[tuple[int, slice]]:
    """(expert, its rows) of those that have any. On a GPU the host waits for it."""
    ends = ends_E.tolist()
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start]


def grouped_product(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """x[rows of e] @ weight[e].T for each expert e, whose rows end before ends[e] (int32): (R, O). In one launch where
    torch has one for these, else expert by expert."""
    at_once = in_one_launch(x_RI, weight_EOI)
    return _GroupedProduct.apply(x_RI, weight_EOI, ends_E, at_once)  # type: ignore[no-any-return, no-untyped-call]


def bind() -> None:
    """Before torch.compile: keep the grouped products out of graphs. Expert by expert they ask how many rows each has,
    which breaks a graph, and other numbers would make other graphs."""
    global grouped_product
    if not hasattr(grouped_product, "_torchdynamo_disable"):
        grouped_product = torch.compiler.disable(grouped_product)  # type: ignore[no-untyped-call]


class GroupedLinear(nn.Module):
    """One matrix an expert, drawn from N(0, std^2)."""

    def __init__(self, experts: int, fan_in: int, fan_out: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, fan_out, fan_in))
        draw(self.weight, std)

    def forward(self, x_RI: Tensor, ends_E: Tensor) -> Tensor:
        return grouped_product(x_RI, self.weight, ends_E)


# --- To the experts and back ----------------------------------------------------------------------
# Every one of these is a gather: on a GPU a scatter that adds would add in an order of its own, and a resumed run would
# not be the same (law 6).


class _Dispatch(torch.autograd.Function):
    """Each token's row, once for every expert that it goes to, sorted by expert."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, places_R: Tensor) -> Tensor:
        ctx.save_for_backward(places_R)
        ctx.tokens = x_TD.shape[0]
        return x_TD[order_R // (len(order_R) // ctx.tokens)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places_R,) = ctx.saved_tensors
        dx_RD = grads[0][places_R]
        return dx_RD.view(ctx.tokens, -1, dx_RD.shape[-1]).sum(1), None, None


class _Return(torch.autograd.Function):
    """Rows sorted by expert, back in the tokens' order."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor, places_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        return y_RD[places_R]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (order_R,) = ctx.saved_tensors
        return grads[0][order_R], None, None


class Router(nn.Module):
    """Top-k router: softmax over all experts in float32, of which the k highest are kept.

    Divided by their sum they are the softmax of the chosen logits alone, and are computed as that: the logits of the
    others have a gradient of exactly 0. Through the sum it would be rounding, different in every micro-batch, of which
    Adam makes steps of the full learning rate.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.experts is not None
        self.weight = nn.Parameter(torch.empty(config.experts.count, config.hidden_size))
        draw(self.weight, config.init_std)
        self.per_token, self.normalised = config.experts.per_token, config.experts.norm_topk_prob

    def forward(self, x_TD: Tensor) -> Routed:
        logits_TE = F.linear(x_TD, self.weight)
        logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
        probabilities_TE = logits_TE.softmax(-1)
        weights_TK, experts_TK = probabilities_TE.topk(self.per_token, -1)
        if self.normalised:
            weights_TK = logits_TE.gather(-1, experts_TK).softmax(-1)
        return Routed(weights_TK, experts_TK, logits_TE, probabilities_TE)


class ExpertFeedForward(nn.Module):
    """Experts, each a SwiGLU over one fused gate/up projection, and the router that chooses among them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.experts is not None
        self.count, width, std = config.experts.count, config.expert_size, config.init_std
        self.router = Router(config)
        self.gate_up = GroupedLinear(self.count, config.hidden_size, 2 * width, std)
        self.down = GroupedLinear(self.count, width, config.hidden_size, std / math.sqrt(2 * config.num_layers))

    def forward(self, x_BSD: Tensor, members: DocumentMembers | None = None) -> tuple[Tensor, ...]:
        """The sum of each token's experts' outputs by their weights; and what `members` sum up of the routing."""
        x_TD = x_BSD.flatten(0, 1)
        routed = self.router(x_TD)
        chosen_R = routed.experts_TK.flatten()
        sorted_R, order_R = chosen_R.sort(stable=True)
        numbers_R = torch.arange(len(order_R), device=order_R.device)
        places_R = torch.empty_like(order_R).scatter_(0, order_R, numbers_R)
        every_E = torch.arange(self.count, device=order_R.device)
        ends_E = torch.searchsorted(sorted_R, every_E, right=True, out_int32=True)
        rows_RD = _Dispatch.apply(x_TD, order_R, places_R)  # type: ignore[no-untyped-call]
        rows_RD = self.down(ops.swiglu(self.gate_up(rows_RD, ends_E)), ends_E)
        y_TKD = _Return.apply(rows_RD, order_R, places_R).unflatten(0, routed.experts_TK.shape)  # type: ignore[no-untyped-call]
        # A product adds up in float32 and rounds once.
        y_TD = torch.bmm(routed.weights_TK[:, None].to(y_TKD.dtype), y_TKD)[:, 0]
        y_BSD = y_TD.view_as(x_BSD)
        return (y_BSD,) if members is None else (y_BSD, members.sums(routed))
