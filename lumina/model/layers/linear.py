"""Linear layers, and how their weights are drawn.

B sequences, S positions, I inputs, O outputs, r of these.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """torch's, of which some outputs can be had alone."""

    def of_rows(self, x_BSI: Tensor, rows: slice) -> Tensor:
        """These of its outputs: (B, S, r)."""
        return F.linear(x_BSI, self.weight[rows], None if self.bias is None else self.bias[rows])


def draw(weight: Tensor, std: float) -> None:
    """Fill with draws from N(0, std^2). A tensor without memory (device meta) is left alone: drawing for it would
    import torch's compiler, four seconds, and every command that uses a trained model makes one."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


def linear(fan_in: int, fan_out: int, std: float, bias: bool = False) -> Linear:
    """A linear layer drawn from N(0, std^2); a bias begins at 0."""
    layer = Linear(fan_in, fan_out, bias=bias)
    draw(layer.weight, std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
