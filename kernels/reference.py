"""The same operations in plain torch, differentiable, in the input's type: what the kernels are measured against.

Given float64 inputs they are the exact reference; given bf16 they round where eager torch would.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _wide(x: torch.Tensor) -> torch.Tensor:
    """float32 for the 16-bit types; float64 stays what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of x [.., W] by weight [W]."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _wide(weight)).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual)."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q [.., S, H, D] and k [.., S, K, D] by cos, sin [P, D/2] at positions [.., S]."""
    cos_SD, sin_SD = cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        low, high = _wide(x).chunk(2, dim=-1)
        return torch.cat((low * cos_SD - high * sin_SD, high * cos_SD + low * sin_SD), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of gate_up [.., 2F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Losses [N] (float32 or wider) of logits [N, V], which become their weighted gradient, as in `cross_entropy`."""
    keep = (weights != 0) & (targets >= 0)
    weights = torch.where(keep, weights, 0.0)
    targets = targets.clamp(min=0).long().unsqueeze(1)
    log_p = torch.log_softmax(_wide(logits), dim=-1)
    losses = -log_p.gather(1, targets).squeeze(1)
    gradient = log_p.exp()
    gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, -1.0))
    logits.copy_(gradient * weights.unsqueeze(1))
    return torch.where(keep, losses, 0.0)
