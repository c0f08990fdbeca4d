"""The output layer and its loss, fused: logits exist for one chunk of rows at a time, and only at supervised positions.

The forward pass computes the gradients too, while a chunk's probabilities are at hand; the backward pass only scales
them. So the vocabulary product is done three times (logits, hidden gradient, weight gradient) and never recomputed.
Where there are several chunks, their weight gradients add up in float32, inside the product that makes them where torch
has such a product; how large chunks are for that is in lumina.config.rows.
N supervised positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lumina.config import CHUNK_BYTES, output_chunk_bytes, round_up
from lumina.model.ops import cross_entropy_

POSITION_BINS = 32
"""K: how many ranges the positions of a row are put into. Range k: 2**k up to 2**(k + 1) - 1 tokens come before."""

_memory: dict[torch.device, int] = {}


def _chunk_bytes(vocabulary: int, element_size: int, device: torch.device) -> int:
    """Bytes of logits alive at once. The device's memory is asked for once: it is a property, not a wait."""
    if device.type != "cuda":
        return CHUNK_BYTES
    if device not in _memory:
        _memory[device] = torch.cuda.get_device_properties(device).total_memory
    return output_chunk_bytes(vocabulary, element_size, _memory[device])


def _chunk_rows(weight_VD: Tensor, rows: int) -> int:
    """Rows per chunk: as many as fit, dealt evenly, so that no small last chunk is left over; whole tiles of rows."""
    if not rows:
        return 1
    vocabulary, element_size = weight_VD.shape[0], weight_VD.element_size()
    most = max(1, _chunk_bytes(vocabulary, element_size, weight_VD.device) // (vocabulary * element_size))
    chunks = -(-rows // most)
    return min(most, round_up(-(-rows // chunks)))


_workspace: Tensor | None = None


def _logits(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """hidden @ weight.T, on a CPU in memory kept from chunk to chunk and step to step.

    Chunks differ in size with the number of supervised tokens, and a heap that gets and frees such blocks among others
    falls to pieces: the resident memory of a nano run grew from 1 to 6 GB in 110 steps. CUDA's allocator copes itself.
    """
    global _workspace
    if hidden_ND.device.type != "cpu" or torch.compiler.is_compiling():
        return hidden_ND @ weight_VD.T
    shape = hidden_ND.shape[0], weight_VD.shape[0]
    count = shape[0] * shape[1]
    if _workspace is None or _workspace.dtype != hidden_ND.dtype or _workspace.numel() < count:
        # A quarter more than asked for, up to a full chunk: it grows a few times at most.
        most = max(count, CHUNK_BYTES // hidden_ND.element_size())
        _workspace = None  # freed before the larger one is made
        _workspace = torch.empty(min(count + count // 4, most), dtype=hidden_ND.dtype)
    return torch.mm(hidden_ND, weight_VD.T, out=_workspace[:count].view(shape))


_in_products: dict[tuple[torch.device, torch.dtype], bool] = {}


def _adds_in_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has the half-precision product that adds to a float32 matrix here: `addmm` with `out_dtype` and a
    float32 input, which CUDA builds have (torch 2.8 took no float32 input yet, ROCm and a CPU have none). Tried once,
    on one element."""
    if device.type != "cuda":
        return False
    if (device, dtype) not in _in_products:
        half, wide = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
        try:
            torch.addmm(wide, half, half, out_dtype=torch.float32, out=wide)
            _in_products[device, dtype] = True
        except (RuntimeError, TypeError, NotImplementedError):
            _in_products[device, dtype] = False
    return _in_products[device, dtype]


def _add_product(sum_VD: Tensor | None, scores_NV: Tensor, hidden_ND: Tensor, wide: torch.dtype) -> Tensor:
    """sum + scores.T @ hidden in `wide`, into the memory of `sum` where there is one: a sum of rounded parts would lose
    bits. Bytes moved a chunk, per element of the sum: 8 in the product itself, 12 where it is made first and added."""
    if scores_NV.dtype is wide:  # float32 and float64 products add by themselves
        return scores_NV.T @ hidden_ND if sum_VD is None else sum_VD.addmm_(scores_NV.T, hidden_ND)
    if _adds_in_products(scores_NV.device, scores_NV.dtype):
        if sum_VD is None:
            return torch.mm(scores_NV.T, hidden_ND, out_dtype=wide)
        return torch.addmm(sum_VD, scores_NV.T, hidden_ND, out_dtype=wide, out=sum_VD)
    product_VD = scores_NV.T @ hidden_ND
    return product_VD.to(wide) if sum_VD is None else sum_VD.add_(product_VD)


def softcap_(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) (arXiv:2408.00118, section 2), over the logits' own memory. Not for autograd."""
    return logits.div_(cap).tanh_().mul_(cap)


class _OutputLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        softcap: float | None,
    ) -> Tensor:
        rows = hidden_ND.shape[0]
        total = hidden_ND.new_zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dhidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
        dweight_VD: Tensor | None = None
        step = _chunk_rows(weight_VD, rows)
        wide = total.dtype if rows > step else hidden_ND.dtype  # a single chunk has nothing to add up
        for start in range(0, rows, step):
            part = slice(start, start + step)
            hidden, weights = hidden_ND[part], weights_N[part]
            scores = _logits(hidden, weight_VD)
            slope = None if softcap is None else 1 - (softcap_(scores, softcap) / softcap).square_()
            losses = cross_entropy_(scores, targets_N[part], weights)
            if slope is not None:  # from the gradient of what is capped to that of the product
                scores.mul_(slope)
            total += (losses.to(total.dtype) * weights.to(total.dtype)).sum()
            if dhidden_ND is not None:
                torch.mm(scores, weight_VD, out=dhidden_ND[part])
            if need_weight:
                dweight_VD = _add_product(dweight_VD, scores, hidden, wide)
        if need_weight:
            dweight_VD = torch.zeros_like(weight_VD) if dweight_VD is None else dweight_VD.to(weight_VD.dtype)
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_ND, dweight_VD = ctx.saved_tensors
        (scale,) = grads
        # On a GPU the host would wait for the scale; there it is applied whatever it is.
        if scale.device.type == "cpu" and scale.item() == 1.0:
            return dhidden_ND, dweight_VD, None, None, None
        scaled = [None if g is None else g.mul_(scale.to(g.dtype)) for g in (dhidden_ND, dweight_VD)]
        return *scaled, None, None, None


@torch.no_grad()
def token_losses(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float | None = None) -> Tensor:
    """cross_entropy(hidden[n] @ weight.T, targets[n]) of each position, in nats: float32 (or float64) (N)."""
    rows = hidden_ND.shape[0]
    ones_N = torch.ones(rows, dtype=torch.float32, device=hidden_ND.device)
    step = _chunk_rows(weight_VD, rows)
    parts = [slice(start, start + step) for start in range(0, rows, step)]
    found = [
        cross_entropy_(_capped_logits(hidden_ND[part], weight_VD, softcap), targets_N[part], ones_N[part])
        for part in parts
    ]
    return torch.cat(found) if found else hidden_ND.new_zeros(0)


def _capped_logits(hidden_ND: Tensor, weight_VD: Tensor, softcap: float | None) -> Tensor:
    logits_NV = _logits(hidden_ND, weight_VD)
    return logits_NV if softcap is None else softcap_(logits_NV, softcap)


def output_loss(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor, softcap: float | None = None
) -> Tensor:
    """sum_n weights[n] * cross_entropy(hidden[n] @ weight.T, targets[n]), in nats: a float32 (or float64) scalar. With
    a `softcap` the logits go through it first.

    Gradients are exact for `hidden` and `weight`; the graph may be run backward once. targets: int64, weights: float32.
    """
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
        return _OutputLoss.apply(hidden_ND, weight_VD, targets_N, weights_N, softcap)  # type: ignore[no-any-return, no-untyped-call]
    total = hidden_ND.new_zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
    for _, losses_n in _weighted_losses(hidden_ND, weight_VD, targets_N, weights_N, softcap):
        total += losses_n.sum()
    return total


def _weighted_losses(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor, softcap: float | None
) -> Iterator[tuple[slice, Tensor]]:
    """A chunk of positions at a time: which they are, and weight * cross-entropy of each. Not for autograd."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    rows = hidden_ND.shape[0]
    step = _chunk_rows(weight_VD, rows)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        losses = cross_entropy_(_capped_logits(hidden_ND[part], weight_VD, softcap), targets_N[part], weights_N[part])
        yield part, losses.to(wide) * weights_N[part].to(wide)


def position_bins(before_N: Tensor) -> Tensor:
    """The range of positions that each token is in, by how many tokens come before it (from 1): int64 (N)."""
    return torch.frexp(before_N.double()).exponent.long() - 1


@torch.no_grad()
def loss_by_position(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    before_N: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """`output_loss`, then the same sum over the tokens of each range of positions, then the sums of their weights:
    float64 (1 + 2K). before_N: int64, how many tokens come before each target."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    total, sums_2K = hidden_ND.new_zeros((), dtype=wide), hidden_ND.new_zeros((2, POSITION_BINS), dtype=torch.float64)
    bins_N, every_K = position_bins(before_N), torch.arange(POSITION_BINS, device=hidden_ND.device)
    for part, losses_n in _weighted_losses(hidden_ND, weight_VD, targets_N, weights_N, softcap):
        total += losses_n.sum()
        # Not index_add_, which adds in an order of its own on a GPU; nor a product, in which one NaN is in every range.
        of_2n1 = torch.stack((losses_n, weights_N[part])).double()[..., None]
        sums_2K += torch.where(bins_N[part, None] == every_K, of_2n1, 0.0).sum(1)
    return torch.cat((total.double()[None], sums_2K.flatten()))
