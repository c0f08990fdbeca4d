"""The output layer and its loss, fused: logits exist for one chunk of rows at a time, and only at supervised positions.

The forward pass computes the gradients too, while a chunk's probabilities are at hand; the backward pass only scales
them. So the vocabulary product is done three times (logits, hidden gradient, weight gradient) and never recomputed.
N supervised positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lumina.config.rows import round_up
from lumina.model.ops import cross_entropy_

# Bytes of logits alive at once. 256 MiB is 1,337 rows of a 100,352-word vocabulary in bfloat16: enough rows for the
# matrix products to run at full speed, small beside the optimizer state.
CHUNK_BYTES = 256 * 2**20


def _chunk_rows(vocabulary: int, element_size: int, rows: int) -> int:
    """Rows per chunk: as many as fit, dealt evenly, so that no small last chunk is left over; whole tiles of rows."""
    most = max(1, CHUNK_BYTES // (vocabulary * element_size))
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


class _OutputLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
        rows, vocabulary = hidden_ND.shape[0], weight_VD.shape[0]
        total = hidden_ND.new_zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dhidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
        dweight_VD: Tensor | None = None
        step = _chunk_rows(vocabulary, hidden_ND.element_size(), rows) if rows else 1
        several = rows > step
        for start in range(0, rows, step):
            part = slice(start, start + step)
            hidden, weights = hidden_ND[part], weights_N[part]
            scores = _logits(hidden, weight_VD)
            losses = cross_entropy_(scores, targets_N[part], weights)
            total += (losses.to(total.dtype) * weights.to(total.dtype)).sum()
            if dhidden_ND is not None:
                torch.mm(scores, weight_VD, out=dhidden_ND[part])
            if need_weight:
                grad = scores.T @ hidden
                if dweight_VD is None:
                    # Chunks add up in float32 (float64 stays): a sum of rounded parts would lose bits.
                    dweight_VD = grad.to(total.dtype) if several else grad
                else:
                    dweight_VD += grad
        if need_weight:
            dweight_VD = torch.zeros_like(weight_VD) if dweight_VD is None else dweight_VD.to(weight_VD.dtype)
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_ND, dweight_VD = ctx.saved_tensors
        (scale,) = grads
        if scale.device.type == "cpu" and scale.item() == 1.0:
            return dhidden_ND, dweight_VD, None, None
        scaled = [None if g is None else g.mul_(scale.to(g.dtype)) for g in (dhidden_ND, dweight_VD)]
        return *scaled, None, None


@torch.no_grad()
def token_losses(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """cross_entropy(hidden[n] @ weight.T, targets[n]) of each position, in nats: float32 (or float64) (N)."""
    rows = hidden_ND.shape[0]
    ones_N = torch.ones(rows, dtype=torch.float32, device=hidden_ND.device)
    step = _chunk_rows(weight_VD.shape[0], hidden_ND.element_size(), rows) if rows else 1
    parts = [slice(start, start + step) for start in range(0, rows, step)]
    found = [cross_entropy_(_logits(hidden_ND[part], weight_VD), targets_N[part], ones_N[part]) for part in parts]
    return torch.cat(found) if found else hidden_ND.new_zeros(0)


def output_loss(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """sum_n weights[n] * cross_entropy(hidden[n] @ weight.T, targets[n]), in nats: a float32 (or float64) scalar.

    Gradients are exact for `hidden` and `weight`; the graph may be run backward once. targets: int64, weights: float32.
    """
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
        return _OutputLoss.apply(hidden_ND, weight_VD, targets_N, weights_N)  # type: ignore[no-any-return, no-untyped-call]
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    total = hidden_ND.new_zeros((), dtype=wide)
    rows = hidden_ND.shape[0]
    step = _chunk_rows(weight_VD.shape[0], hidden_ND.element_size(), rows) if rows else 1
    for start in range(0, rows, step):
        part = slice(start, start + step)
        losses = cross_entropy_(_logits(hidden_ND[part], weight_VD), targets_N[part], weights_N[part])
        total += (losses.to(wide) * weights_N[part].to(wide)).sum()
    return total
