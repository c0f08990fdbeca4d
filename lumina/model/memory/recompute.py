"""Activation checkpointing: a layer keeps its input alone and is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from lumina.model.memory.offload import HostCopies


def recomputed(
    layer: Callable[..., tuple[Tensor, ...]],
    copies: HostCopies | None,
    delta_BSD: Tensor,
    residual_BSD: Tensor | None,
    *rest: object,
) -> tuple[Tensor, ...]:
    """layer(delta, residual, *rest, summed, recomputing), whose inner activations are made again in the backward pass.
    What is kept, in `copies` where there are some, is the sum delta + residual, which the layer's first norm rounds
    before it uses it, too."""
    first = residual_BSD is None
    x_BSD = delta_BSD if residual_BSD is None else delta_BSD + residual_BSD
    if first and torch.is_grad_enabled() and not x_BSD.requires_grad:
        # Over a frozen embedding nothing that goes in has a gradient, and checkpoint() then gives adapters none either.
        x_BSD = x_BSD.detach().requires_grad_()

    def run(x: Tensor) -> tuple[Tensor, ...]:
        again = torch.is_grad_enabled()
        outputs = layer(x, None, *rest, summed=not first, recomputing=again)
        # Of the second time the graph alone is wanted: without this its results would be held to the layer's end.
        return tuple(_WithoutMemory.apply(out) for out in outputs) if again else outputs  # type: ignore[no-untyped-call]

    if copies is None:
        from deepspeed.runtime.activation_checkpointing.checkpointing import checkpoint

        outputs: tuple[Tensor, ...] = checkpoint(run, x_BSD)
        return outputs
    with copies.saved():  # DeepSpeed's checkpoint() keeps its inputs past autograd's hooks
        outputs = torch_checkpoint(run, x_BSD, use_reentrant=True)
    return outputs


class _WithoutMemory(torch.autograd.Function):
    """In a result's place in the graph: its shape and its gradient, and NaN for its values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_full((), torch.nan).expand_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
