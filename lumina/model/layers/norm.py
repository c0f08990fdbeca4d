"""RMSNorm (arXiv:1910.07467) over a residual sum. Shape suffixes as in transformer.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lumina.config import ModelConfig
from lumina.model import ops


class RMSNorm(nn.Module):
    """Root-mean-square norm; adds the residual first when there is one, since both touch the same memory."""

    def __init__(self, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.offset = config.structure.norm_offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - self.offset))
        self.eps = config.rms_norm_eps

    def forward(self, x_BSD: Tensor, residual_BSD: Tensor | None = None, summed: bool = False) -> tuple[Tensor, Tensor]:
        """Return (normed, new residual): norm(x + residual) and x + residual. summed: x is that sum, and a gradient of
        both results is added up as of one."""
        weight_D: Tensor = self.weight
        if self.offset:  # in float32: near 1, half precision would round away what was learned
            weight_D = self.offset + weight_D.to(torch.promote_types(weight_D.dtype, torch.float32))
        if residual_BSD is None and not summed:
            return ops.rms_norm(x_BSD, weight_D, self.eps), x_BSD
        return ops.add_rms_norm(x_BSD, residual_BSD, weight_D, self.eps)


class Sum(nn.Module):
    """In a norm's place where a sublayer reads the residual itself."""

    def forward(self, x_BSD: Tensor, residual_BSD: Tensor | None = None, summed: bool = False) -> tuple[Tensor, Tensor]:
        total_BSD = x_BSD if residual_BSD is None else x_BSD + residual_BSD
        return total_BSD, total_BSD
