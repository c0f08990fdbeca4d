"""SwiGLU on a fused gate-and-up projection (Shazeer 2020, arXiv:2002.05202).

    x [.., 2F] = (gate, up);  h = silu(gate) * up,  silu(g) = g * sigmoid(g)
    dup = dh * silu(gate);    dgate = dh * up * s * (1 + gate * (1 - s)),  s = sigmoid(gate)

Only the projection is kept for the backward: the sigmoid and the product are made again from it, and the two
gradients are written side by side, as the projection's own backward wants them. Arithmetic in float32. Bytes per
element of h in bf16: 6 forward (read gate and up, write h), 10 backward (read dh, gate and up, write both gradients).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Kernels are written in Triton's language, whose arguments (pointers, blocks) have no Python types.

from __future__ import annotations

import importlib
from typing import Any

import torch
import triton
import triton.language as tl

from . import launch, plans, reference
from .benchmark import Case, Function, benchmark
from .launch import Launch, Tile, cdiv
from .plans import Plans

# ---------------------------------------------------------------- kernels


@triton.jit
def _forward(x_ptr, h_ptr, rows, width, blocks, x_stride, h_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    # One grid axis for both directions: the second axis of a grid ends at 65,535.
    program = tl.program_id(0)
    row_R = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col_F = (program % blocks) * COLS + tl.arange(0, COLS)
    inside_RF = (row_R < rows)[:, None] & (col_F < width)[None, :]
    from_RF = x_ptr + row_R[:, None] * x_stride + col_F[None, :]
    gate_RF = tl.load(from_RF, mask=inside_RF, other=0.0).to(tl.float32)
    up_RF = tl.load(from_RF + width, mask=inside_RF, other=0.0).to(tl.float32)
    h_RF = gate_RF * tl.sigmoid(gate_RF) * up_RF
    tl.store(h_ptr + row_R[:, None] * h_stride + col_F[None, :], h_RF.to(h_ptr.dtype.element_ty), mask=inside_RF)


@triton.jit
def _backward(
    dh_ptr, x_ptr, dx_ptr, rows, width, blocks, dh_stride, x_stride, dx_stride, ROWS: tl.constexpr, COLS: tl.constexpr
):
    program = tl.program_id(0)
    row_R = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col_F = (program % blocks) * COLS + tl.arange(0, COLS)
    inside_RF = (row_R < rows)[:, None] & (col_F < width)[None, :]
    from_RF = x_ptr + row_R[:, None] * x_stride + col_F[None, :]
    to_RF = dx_ptr + row_R[:, None] * dx_stride + col_F[None, :]
    dh_RF = tl.load(dh_ptr + row_R[:, None] * dh_stride + col_F[None, :], mask=inside_RF, other=0.0).to(tl.float32)
    gate_RF = tl.load(from_RF, mask=inside_RF, other=0.0).to(tl.float32)
    up_RF = tl.load(from_RF + width, mask=inside_RF, other=0.0).to(tl.float32)
    sigmoid_RF = tl.sigmoid(gate_RF)
    dgate_RF = dh_RF * up_RF * sigmoid_RF * (1.0 + gate_RF * (1.0 - sigmoid_RF))
    dup_RF = dh_RF * gate_RF * sigmoid_RF
    tl.store(to_RF, dgate_RF.to(dx_ptr.dtype.element_ty), mask=inside_RF)
    tl.store(to_RF + width, dup_RF.to(dx_ptr.dtype.element_ty), mask=inside_RF)


# ---------------------------------------------------------------- launches


def forward_launch(x_NF: torch.Tensor, h_NF: torch.Tensor) -> Launch:
    """x_NF is the fused [N, 2F] projection, h_NF the [N, F] result."""
    rows, width = h_NF.shape

    def build(tile: Tile) -> Launch:
        blocks = cdiv(width, tile.cols)
        args = (x_NF, h_NF, rows, width, blocks, x_NF.stride(0), h_NF.stride(0))
        return Launch(
            _forward, (cdiv(rows, tile.rows) * blocks,), args, {"ROWS": tile.rows, "COLS": tile.cols}, tile.warps
        )

    tiles = launch.elementwise_tiles(width, rows, launch.multiprocessors(x_NF.device))
    return build(launch.pick(f"swiglu forward {x_NF.dtype} {width}", tiles, build, device=x_NF.device))


def backward_launch(dh_NF: torch.Tensor, x_NF: torch.Tensor, dx_NF: torch.Tensor) -> Launch:
    """Writes dx_NF [N, 2F] from dh_NF [N, F] and the projection x_NF [N, 2F]."""
    rows, width = dh_NF.shape

    def build(tile: Tile) -> Launch:
        blocks = cdiv(width, tile.cols)
        args = (dh_NF, x_NF, dx_NF, rows, width, blocks, dh_NF.stride(0), x_NF.stride(0), dx_NF.stride(0))
        return Launch(
            _backward, (cdiv(rows, tile.rows) * blocks,), args, {"ROWS": tile.rows, "COLS": tile.cols}, tile.warps
        )

    tiles = launch.elementwise_tiles(width, rows, launch.multiprocessors(x_NF.device))
    return build(launch.pick(f"swiglu backward {x_NF.dtype} {width}", tiles, build, device=x_NF.device))


# ---------------------------------------------------------------- operators


_FORWARD, _BACKWARD = Plans(), Plans()


def _swiglu(x: torch.Tensor) -> torch.Tensor:
    h = _half(x)
    key = plans.signature(x)
    plan = _FORWARD.get(key)
    if plan is not None and plan(x, h):
        return h
    _check_width(x)
    launch.check(x)
    if h.numel():
        rows = plans.distinct(launch.as_rows(x), h.view(-1, h.shape[-1]))
        _FORWARD.run(key, [forward_launch(*rows)], rows, (x, h))
    return h


def _swiglu_backward(dh: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dx = launch.like(x)
    key = plans.signature(dh, x)
    plan = _BACKWARD.get(key)
    if plan is not None and plan(dh, x, dx):
        return dx
    launch.check(dh, x)
    if dh.numel():
        rows = plans.distinct(launch.as_rows(dh), launch.as_rows(x), dx.view(-1, dx.shape[-1]))
        _BACKWARD.run(key, [backward_launch(*rows)], rows, (dh, x, dx))
    return dx


def _check_width(gate_up: torch.Tensor) -> None:
    if gate_up.shape[-1] % 2:
        raise ValueError(f"the last dimension must hold gate and up, got the odd width {gate_up.shape[-1]}")


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _differentiate(ctx: Any, dh: torch.Tensor) -> torch.Tensor:
    (x,) = ctx.saved_tensors
    if plans.direct(dh, x) and not torch.is_grad_enabled():
        return _swiglu_backward(dh, x)
    dx: torch.Tensor = swiglu_backward_op(dh, x)
    return dx


swiglu_backward_op = launch.register(
    "swiglu_backward(Tensor dh, Tensor x) -> Tensor", _swiglu_backward, lambda dh, x: launch.like(x)
)
swiglu_op = launch.register("swiglu(Tensor x) -> Tensor", _swiglu, _half, setup=_save, backward=_differentiate)


class _SwiGLU(torch.autograd.Function):
    """`swiglu` without the dispatcher (see `plans.direct`)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _swiglu(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return _differentiate(ctx, *grads)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of a fused projection gate_up [.., 2F]: a contiguous [.., F] of its type.

    Raises ValueError for an odd width, TypeError for types other than bf16, fp16 and fp32.
    """
    h: torch.Tensor
    if plans.direct(gate_up):
        h = _SwiGLU.apply(gate_up) if torch.is_grad_enabled() else _swiglu(gate_up)  # type: ignore[no-untyped-call]
        return h
    _check_width(gate_up)
    h = swiglu_op(gate_up)
    return h


# ---------------------------------------------------------------- benchmark


def _launches(case: Case, device: str) -> list[Launch]:
    x, dx = (torch.empty(case.rows, 2 * case.width, dtype=case.dtype, device=device) for _ in range(2))
    h = torch.empty(case.rows, case.width, dtype=case.dtype, device=device)
    return [forward_launch(x, h) if case.direction == "forward" else backward_launch(h, x, dx)]


def _liger() -> Function:
    gates = importlib.import_module("liger_kernel.ops.swiglu")
    return lambda gate_up: gates.LigerSiLUMulFunction.apply(*gate_up.chunk(2, -1))


benchmark(
    "swiglu",
    swiglu,
    reference.swiglu,
    limits={"forward": 3, "backward": 5},
    width=lambda shape: shape.ffn,
    arguments=lambda case, device: (case.normal(case.rows, 2 * case.width, device=device),),
    launches=_launches,
    liger=_liger,
)
