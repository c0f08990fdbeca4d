"""Matrix products of the blocks in 8-bit floating point, with weights, activations and gradients kept in bfloat16.

Each operand is divided by a scale, the largest magnitude over the type's largest number, and rounded to e4m3 (4 bits of
exponent, largest number 448) or e5m2 (5 bits, 57,344; arXiv:2209.05433). Tensor cores multiply these and add up in
float32, and the scales are multiplied back. They are made from the values at every product and stay on the device.

    recipe       scales                      y = x W^T and dx = dy W      dW = dy^T x
    tensorwise   one a tensor                8 bits (dy in e5m2)          8 bits (dy in e5m2)
    rowwise      one a row of each operand   8 bits                       bfloat16

With `tensorwise` how a token is rounded depends on the other tokens of its micro-batch, so law 2 holds within that
rounding only. With `rowwise` it does not: y and dx of a token are functions of the token, and dW is the usual product.

The embedding, the output layer and its loss stay in bfloat16, and so does everything outside training: an evaluation
says what the saved weights give. Shape suffixes: T tokens, I inputs, O outputs, n the axis that a product sums over.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from lumina.config import Config, UserError
from lumina.model.layers.linear import Linear
from lumina.model.transformer import Transformer

Recipe = Literal["tensorwise", "rowwise"]

#: Matrix units take operands whose sides are multiples of this.
TILE = 16
#: Compute capability of the first GPUs that multiply in 8 bits: 8.9 Ada, 9.0 Hopper, 10.0 Blackwell.
CAPABILITY = (8, 9)

_SMALLEST = 1e-12  # magnitudes below this are zero: a row of zeros has a scale all the same
_SCALING = {"tensorwise": ScalingType.TensorWise, "rowwise": ScalingType.RowWise}


def quantise(x_Rn: Tensor, dtype: torch.dtype, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(q, scale) with q * scale = x up to the rounding of `dtype`: q (R, n); scale float32, (R, 1) or ().
    Values are read in float32 and none saturates."""
    wide_Rn = x_Rn.float()
    largest = wide_Rn.abs().amax(-1, keepdim=True) if recipe == "rowwise" else wide_Rn.abs().amax()
    limit = torch.finfo(dtype).max
    scale = largest.clamp_min(_SMALLEST) / limit
    return (wide_Rn / scale).clamp(-limit, limit).to(dtype), scale


def multiply(a_Mn: Tensor, b_Nn: Tensor, recipe: Recipe, gradient: bool = False) -> Tensor:
    """a @ b.T in 8 bits: bfloat16 (M, N). gradient: `a` is one, whose range `tensorwise` gives the wider type."""
    wide = gradient and recipe == "tensorwise"
    a8_Mn, a_scale = quantise(a_Mn, torch.float8_e5m2 if wide else torch.float8_e4m3fn, recipe)
    b8_Nn, b_scale = quantise(b_Nn, torch.float8_e4m3fn, recipe)
    scaling, across = _SCALING[recipe], b_scale.mT.contiguous() if recipe == "rowwise" else b_scale
    # Both operands have to be contiguous along n. Fast accumulation stays off: it would keep Hopper's partial sums, of
    # about 14 bits, in the tensor cores (arXiv:2412.19437, section 3.3.2).
    return F.scaled_mm(
        a8_Mn.contiguous(), b8_Nn.contiguous().mT, a_scale, scaling, across, scaling, output_dtype=torch.bfloat16
    )


class _Float8Product(torch.autograd.Function):
    """x W^T. The weight is saved as the parameter that it is, which ZeRO-3 takes away after the forward pass and brings
    back before the backward pass; a transposed or rounded copy would keep it on every rank."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        ctx.recipe = recipe
        return multiply(x_TI, weight_OI, recipe)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = grads
        x_TI, weight_OI = ctx.saved_tensors
        dx_TI = dweight_OI = None
        if ctx.needs_input_grad[0]:
            dx_TI = multiply(dy_TO, weight_OI.mT, ctx.recipe, gradient=True)
        if ctx.needs_input_grad[1]:
            if ctx.recipe == "rowwise":
                dweight_OI = dy_TO.mT @ x_TI
            else:
                dweight_OI = multiply(dy_TO.mT, x_TI.mT, ctx.recipe, gradient=True)
        return dx_TI, dweight_OI, None


class Float8Linear(Linear):
    """A linear layer that multiplies in 8 bits while it trains."""

    recipe: Recipe

    def forward(self, x_BSI: Tensor) -> Tensor:
        if not self.training:  # whatever grad mode is: the first pass of a recomputed layer runs without gradients
            return super().forward(x_BSI)
        y_TO: Tensor = _Float8Product.apply(x_BSI.flatten(0, -2), self.weight, self.recipe)  # type: ignore[no-untyped-call]
        y_BSO = y_TO.view(*x_BSI.shape[:-1], self.out_features)
        return y_BSO if self.bias is None else y_BSO + self.bias

    def of_rows(self, x_BSI: Tensor, rows: slice) -> Tensor:
        """As the whole product gives them by `rowwise`, where each row has a scale of its own."""
        if not self.training:
            return super().of_rows(x_BSI, rows)
        y_BSr = multiply(x_BSI.flatten(0, -2), self.weight[rows], self.recipe).view(*x_BSI.shape[:-1], -1)
        return y_BSr if self.bias is None else y_BSr + self.bias[rows]


def convert(model: Transformer, recipe: Recipe) -> None:
    """Make the blocks' linear layers multiply in 8 bits; their parameters, names and draws stay. UserError for a width
    that matrix units do not take."""
    for name, layer in model.blocks.named_modules():
        if not isinstance(layer, Linear):
            continue
        if layer.in_features % TILE or layer.out_features % TILE:
            raise UserError(
                f"float8: blocks.{name} is {layer.out_features} x {layer.in_features}",
                f"Both sides have to be multiples of {TILE}: change the model's shape, or train without float8.",
            )
        layer.__class__ = Float8Linear
        layer.recipe = recipe  # type: ignore[assignment]


def check(config: Config) -> None:
    """Refuse, by UserError, what float8 cannot train: another precision, experts, adapters, a GPU without 8-bit
    products. On a CPU torch multiplies the same 8-bit numbers, slowly."""
    if config.precision != "bf16":
        raise UserError(f"float8 with {config.precision}", "Set precision to bf16, or leave float8 out.")
    if config.experts is not None:
        raise UserError("float8 with experts", "Experts multiply in bfloat16: leave float8 out.")
    if config.lora_rank:
        raise UserError("float8 with lora_rank", "Adapters train over bfloat16 weights: leave one of the two out.")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY:
        name = torch.cuda.get_device_name()
        raise UserError(f"{name} does not multiply in 8 bits", "float8 needs an Ada, Hopper or Blackwell GPU.")
