"""A part of a layer that works on single tokens, computed tile by tile (arXiv:2506.13996, section 3.1).

The forward pass keeps the sum of its two inputs alone; the backward pass computes each tile again, so that what lies
inside (of a feed-forward, 3 * F numbers a token) exists for one tile of tokens at a time. The result is that of all
tokens at once. The weights' gradients of the tiles are added up here, in float32 or wider, and given to autograd once:
DeepSpeed reduces a gradient whenever autograd has one. Nothing in here is collective, so that ranks may have different
numbers of tiles; under ZeRO-3 the weights are gathered around the whole layer (lumina.train.deepspeed.engine).

T tokens, t tokens of a tile, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: (x, residual), both (1, t, D), to (delta, x + residual): a token's results depend on that token alone.
PerToken = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def tiled(
    function: PerToken,
    parameters: Sequence[nn.Parameter],
    tile: int,
    x_BSD: Tensor,
    residual_BSD: Tensor,
    *,
    recomputing: bool = False,
) -> tuple[Tensor, Tensor]:
    """function(x, residual), `tile` tokens at a time; `parameters`: all that it has. recomputing: only the graph is
    wanted, of a layer that is computed again for its backward pass: delta is then NaN and nothing is computed for it.
    """
    delta_BSD, total_BSD = _Tiled.apply(function, tile, recomputing, x_BSD, residual_BSD, *parameters)  # type: ignore[no-untyped-call]
    return delta_BSD, total_BSD


def _parts(tokens: int, tile: int) -> Iterator[slice]:
    return (slice(start, min(start + tile, tokens)) for start in range(0, tokens, tile))


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: PerToken,
        tile: int,
        recomputing: bool,
        x_BSD: Tensor,
        residual_BSD: Tensor,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        ctx.function, ctx.tile, ctx.parameters = function, tile, parameters
        if recomputing:
            total_BSD = x_BSD + residual_BSD
            delta_BSD = x_BSD.new_full((), torch.nan).expand_as(x_BSD)
        else:
            total_BSD, delta_BSD = torch.empty_like(x_BSD), torch.empty_like(x_BSD)
            rows = [rows_BSD.flatten(0, 1) for rows_BSD in (x_BSD, residual_BSD)]
            results = [rows_BSD.flatten(0, 1) for rows_BSD in (delta_BSD, total_BSD)]
            for part in _parts(len(rows[0]), tile):
                for result_TD, found_1tD in zip(results, function(*(r[part][None] for r in rows)), strict=True):
                    result_TD[part] = found_1tD[0]
        ctx.save_for_backward(total_BSD)
        return delta_BSD, total_BSD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (total_BSD,) = ctx.saved_tensors
        wanted = [parameter for parameter in ctx.parameters if parameter.requires_grad]
        sums: list[Tensor] = []
        dx_BSD = torch.empty_like(total_BSD)
        total_TD, dx_TD, ddelta_TD, dtotal_TD = (x.flatten(0, 1) for x in (total_BSD, dx_BSD, *grads))
        for part in _parts(len(total_TD), ctx.tile):
            x_1tD = total_TD[part][None].detach().requires_grad_()
            # x + 0 is x, to the bit; the norm's own backward then adds the residual's gradient, as without tiles.
            with torch.enable_grad():
                results = ctx.function(x_1tD, x_1tD.new_zeros(()).expand_as(x_1tD))
            upstream = ddelta_TD[part][None], dtotal_TD[part][None]
            dx_1tD, *found = torch.autograd.grad(results, (x_1tD, *wanted), upstream)
            dx_TD[part] = dx_1tD[0]
            if not sums:
                sums = [g.to(torch.promote_types(g.dtype, torch.float32), copy=True) for g in found]
            else:
                for total, gradient in zip(sums, found, strict=True):
                    total.add_(gradient)
        of = {id(p): total.to(p.dtype) for p, total in zip(wanted, sums, strict=True)}
        return None, None, None, dx_BSD, dx_BSD, *(of.get(id(parameter)) for parameter in ctx.parameters)
