"""RMSNorm's Triton kernels and their launches, with and without residual addition (arXiv:1910.07467).

    y = x / sqrt(mean(x^2) + eps) * weight        s = x + residual; y = norm(s), and s goes on as the new residual

x [..., W] in bf16, fp16 or fp32; weight [W]; arithmetic in float32. With r = 1 / sqrt(mean(x^2) + eps) and n = x * r:

    dx = r * (dy * weight - n * mean(dy * weight * n))        dweight = sum over rows of dy * n

Nothing but the input is saved: r is recomputed from the row that the backward holds anyway. Bytes per element in bf16:
forward 4 (with the addition 8), backward 6 (8).

The backward is persistent. Each program walks every P-th block of rows, keeps its partial sum of the weight's gradient
in registers, and a second kernel adds the P partials in a fixed order, so that gradients are the same bits on every
run. Rows wider than `FUSED_BACKWARD` do not fit beside that sum: dx is then made in two sweeps over a row (the second
hits L2) and dweight by a kernel over columns, at 4 more bytes per element.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Kernels are written in Triton's language, whose arguments (pointers, blocks) have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .launch import Launch, Tile, cdiv, power_of_two

#: Widest row (padded to a power of two) held whole by one forward program, in bytes, and by a backward one, in
#: elements.
FUSED_FORWARD = 65536
FUSED_BACKWARD = 8192
#: Widest row, in bytes, that a backward program loads while it works on the one before. Wider ones (float32 past 4,096)
#: take 1,024 threads, which leaves each 64 registers: with two rows in them the compiler of Triton 3.6 and 3.7 spills.
PREFETCHED = 16384
#: Columns per sweep step of the kernels for wider rows.
SWEEP = 4096
#: Rows that a backward program must have before another is started: its partial sum of dweight (8 bytes per column,
#: written and read) then adds at most 8 / 32 = 0.25 bytes to the 6 per element.
ROWS_PER_PROGRAM = 32


# ---------------------------------------------------------------- kernels


@triton.jit
def _forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rows, width, x_stride, residual_stride, y_stride, sum_stride, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # Rows are counted in 64 bits: row * stride passes 2^31 long before a row does.
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col_W = tl.arange(0, COLS)
    inside_W = col_W < width
    inside_RW = (row_R < rows)[:, None] & inside_W[None, :]
    x_RW = tl.load(x_ptr + row_R[:, None] * x_stride + col_W[None, :], mask=inside_RW, other=0.0)
    if ADD:
        residual_RW = tl.load(
            residual_ptr + row_R[:, None] * residual_stride + col_W[None, :], mask=inside_RW, other=0.0
        )
        # Rounded to the stream's type before the norm: the backward sees the rounded sum, and so must the forward.
        x_RW = (x_RW.to(tl.float32) + residual_RW.to(tl.float32)).to(x_RW.dtype)
        tl.store(sum_ptr + row_R[:, None] * sum_stride + col_W[None, :], x_RW, mask=inside_RW)
    x_RW = x_RW.to(tl.float32)
    weight_W = tl.load(weight_ptr + col_W, mask=inside_W, other=0.0).to(tl.float32)
    rstd_R = tl.rsqrt(tl.sum(x_RW * x_RW, axis=1) / width + eps)
    y_RW = x_RW * rstd_R[:, None] * weight_W[None, :]
    tl.store(y_ptr + row_R[:, None] * y_stride + col_W[None, :], y_RW.to(y_ptr.dtype.element_ty), mask=inside_RW)


@triton.jit
def _forward_wide(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rows, width, x_stride, residual_stride, y_stride, sum_stride, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    squares_W = tl.zeros([COLS], tl.float32)
    for start in range(0, width, COLS):
        col_W = start + tl.arange(0, COLS)
        inside_W = col_W < width
        x_W = tl.load(x_ptr + row * x_stride + col_W, mask=inside_W, other=0.0)
        if ADD:
            residual_W = tl.load(residual_ptr + row * residual_stride + col_W, mask=inside_W, other=0.0)
            x_W = (x_W.to(tl.float32) + residual_W.to(tl.float32)).to(x_W.dtype)
            tl.store(sum_ptr + row * sum_stride + col_W, x_W, mask=inside_W)
        squares_W += x_W.to(tl.float32) * x_W.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(squares_W, axis=0) / width + eps)
    for start in range(0, width, COLS):
        col_W = start + tl.arange(0, COLS)
        inside_W = col_W < width
        if ADD:  # each thread reads back what it wrote itself
            x_W = tl.load(sum_ptr + row * sum_stride + col_W, mask=inside_W, other=0.0)
        else:
            x_W = tl.load(x_ptr + row * x_stride + col_W, mask=inside_W, other=0.0)
        weight_W = tl.load(weight_ptr + col_W, mask=inside_W, other=0.0).to(tl.float32)
        y_W = x_W.to(tl.float32) * rstd * weight_W
        tl.store(y_ptr + row * y_stride + col_W, y_W.to(y_ptr.dtype.element_ty), mask=inside_W)


@triton.jit
def _backward(
    dy_ptr, x_ptr, weight_ptr, dsum_ptr, dx_ptr, partial_ptr, rows, width, dy_stride, x_stride, dsum_stride, dx_stride,
    eps, ADD: tl.constexpr, PREFETCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * ROWS
    col_W = tl.arange(0, COLS)
    inside_W = col_W < width
    weight_W = tl.load(weight_ptr + col_W, mask=inside_W, other=0.0).to(tl.float32)
    partial_RW = tl.zeros([ROWS, COLS], tl.float32)
    row_R = program * ROWS + tl.arange(0, ROWS)
    inside_RW = (row_R < rows)[:, None] & inside_W[None, :]
    x_RW = tl.load(x_ptr + row_R[:, None] * x_stride + col_W[None, :], mask=inside_RW, other=0.0)
    dy_RW = tl.load(dy_ptr + row_R[:, None] * dy_stride + col_W[None, :], mask=inside_RW, other=0.0)
    for _ in range(program * ROWS, rows, step):
        next_R = row_R + step
        next_RW = (next_R < rows)[:, None] & inside_W[None, :]
        if PREFETCH:
            # The next tile is asked for before this one is worked on, packed as it lies in memory: two in flight.
            next_x_RW = tl.load(x_ptr + next_R[:, None] * x_stride + col_W[None, :], mask=next_RW, other=0.0)
            next_dy_RW = tl.load(dy_ptr + next_R[:, None] * dy_stride + col_W[None, :], mask=next_RW, other=0.0)
        n_RW = x_RW.to(tl.float32)
        dy32_RW = dy_RW.to(tl.float32)
        rstd_R = tl.rsqrt(tl.sum(n_RW * n_RW, axis=1) / width + eps)
        n_RW = n_RW * rstd_R[:, None]
        partial_RW += dy32_RW * n_RW
        dy32_RW = dy32_RW * weight_W[None, :]
        mean_R = tl.sum(dy32_RW * n_RW, axis=1) / width
        dx_RW = (dy32_RW - n_RW * mean_R[:, None]) * rstd_R[:, None]
        if ADD:
            dx_RW += tl.load(dsum_ptr + row_R[:, None] * dsum_stride + col_W[None, :], mask=inside_RW, other=0.0).to(
                tl.float32
            )
        dx_RW = dx_RW.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + row_R[:, None] * dx_stride + col_W[None, :], dx_RW, mask=inside_RW)
        if not PREFETCH:
            next_x_RW = tl.load(x_ptr + next_R[:, None] * x_stride + col_W[None, :], mask=next_RW, other=0.0)
            next_dy_RW = tl.load(dy_ptr + next_R[:, None] * dy_stride + col_W[None, :], mask=next_RW, other=0.0)
        row_R, inside_RW, x_RW, dy_RW = next_R, next_RW, next_x_RW, next_dy_RW
    tl.store(partial_ptr + program * width + col_W, tl.sum(partial_RW, axis=0), mask=inside_W)


@triton.jit
def _backward_wide(
    dy_ptr, x_ptr, weight_ptr, dsum_ptr, dx_ptr, rstd_ptr, rows, width, dy_stride, x_stride, dsum_stride, dx_stride,
    eps, ADD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    squares_W = tl.zeros([COLS], tl.float32)
    dots_W = tl.zeros([COLS], tl.float32)
    for start in range(0, width, COLS):
        col_W = start + tl.arange(0, COLS)
        inside_W = col_W < width
        x_W = tl.load(x_ptr + row * x_stride + col_W, mask=inside_W, other=0.0).to(tl.float32)
        dy_W = tl.load(dy_ptr + row * dy_stride + col_W, mask=inside_W, other=0.0).to(tl.float32)
        weight_W = tl.load(weight_ptr + col_W, mask=inside_W, other=0.0).to(tl.float32)
        squares_W += x_W * x_W
        dots_W += dy_W * weight_W * x_W
    rstd = tl.rsqrt(tl.sum(squares_W, axis=0) / width + eps)
    mean = tl.sum(dots_W, axis=0) * rstd / width
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, width, COLS):
        col_W = start + tl.arange(0, COLS)
        inside_W = col_W < width
        x_W = tl.load(x_ptr + row * x_stride + col_W, mask=inside_W, other=0.0).to(tl.float32)
        dy_W = tl.load(dy_ptr + row * dy_stride + col_W, mask=inside_W, other=0.0).to(tl.float32)
        weight_W = tl.load(weight_ptr + col_W, mask=inside_W, other=0.0).to(tl.float32)
        dx_W = (dy_W * weight_W - x_W * rstd * mean) * rstd
        if ADD:
            dx_W += tl.load(dsum_ptr + row * dsum_stride + col_W, mask=inside_W, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * dx_stride + col_W, dx_W.to(dx_ptr.dtype.element_ty), mask=inside_W)


@triton.jit
def _wide_partials(
    dy_ptr, x_ptr, rstd_ptr, partial_ptr, rows, width, dy_stride, x_stride, per_program, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(1).to(tl.int64)
    col_W = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside_W = col_W < width
    partial_RW = tl.zeros([ROWS, COLS], tl.float32)
    stop = tl.minimum((program + 1) * per_program, rows)
    for start in range(program * per_program, stop, ROWS):
        row_R = start + tl.arange(0, ROWS).to(tl.int64)
        inside_RW = (row_R < stop)[:, None] & inside_W[None, :]
        x_RW = tl.load(x_ptr + row_R[:, None] * x_stride + col_W[None, :], mask=inside_RW, other=0.0)
        dy_RW = tl.load(dy_ptr + row_R[:, None] * dy_stride + col_W[None, :], mask=inside_RW, other=0.0)
        rstd_R = tl.load(rstd_ptr + row_R, mask=row_R < stop, other=0.0)
        partial_RW += dy_RW.to(tl.float32) * x_RW.to(tl.float32) * rstd_R[:, None]
    tl.store(partial_ptr + program * width + col_W, tl.sum(partial_RW, axis=0), mask=inside_W)


@triton.jit
def _sum_partials(
    partial_ptr, dweight_ptr, partials, width, INNER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    col_W = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside_W = col_W < width
    total_RW = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, partials, ROWS):
        partial_R = start + tl.arange(0, ROWS)
        total_RW += tl.load(
            partial_ptr + partial_R.to(tl.int64)[:, None] * width + col_W[None, :],
            mask=(partial_R < partials)[:, None] & inside_W[None, :],
            other=0.0,
        )
    # In two levels: no chain of additions is longer than the square root of their number.
    total_W = tl.sum(tl.sum(tl.reshape(total_RW, [ROWS // INNER, INNER, COLS]), axis=0), axis=0)
    tl.store(dweight_ptr + col_W, total_W.to(dweight_ptr.dtype.element_ty), mask=inside_W)


# ---------------------------------------------------------------- launches


def forward_launch(
    x_NW: torch.Tensor,
    residual_NW: torch.Tensor | None,
    weight_W: torch.Tensor,
    y_NW: torch.Tensor,
    sum_NW: torch.Tensor | None,
    eps: float,
) -> Launch:
    """The forward launch; with `residual_NW` it also writes `sum_NW` = x + residual."""
    rows, width = x_NW.shape
    residual = x_NW if residual_NW is None else residual_NW
    total = y_NW if sum_NW is None else sum_NW

    def build(tile: Tile) -> Launch:
        wide = tile.cols * x_NW.itemsize > FUSED_FORWARD
        return Launch(
            _forward_wide if wide else _forward,
            (rows if wide else cdiv(rows, tile.rows),),
            (x_NW, residual, weight_W, y_NW, total, rows, width, x_NW.stride(0), residual.stride(0), y_NW.stride(0),
             total.stride(0), eps),
            {"ADD": residual_NW is not None, "ROWS": tile.rows, "COLS": SWEEP if wide else tile.cols},
            8 if wide else tile.warps,
        )  # fmt: skip

    tiles = launch.norm_tiles(width, rows, launch.multiprocessors(x_NW.device), x_NW.itemsize, backward=False)
    name = f"rms_norm forward add={residual_NW is not None} {x_NW.dtype} {width}"
    return build(launch.pick(name, tiles, build, device=x_NW.device))


def num_partials(rows: int, height: int, sms: int) -> int:
    """Programs of the persistent backward, each of which leaves a partial sum of dweight.

    Two per SM where each gets `ROWS_PER_PROGRAM` rows, at least one per SM (rows so few that this costs bytes lie in
    L2 anyway), and never more than there are blocks of `height` rows.
    """
    return min(2 * sms, max(sms, rows // ROWS_PER_PROGRAM), cdiv(rows, height))


def backward_launches(
    dy_NW: torch.Tensor,
    x_NW: torch.Tensor,
    weight_W: torch.Tensor,
    dsum_NW: torch.Tensor | None,
    dx_NW: torch.Tensor,
    dweight_W: torch.Tensor,
    eps: float,
) -> list[Launch]:
    """The backward launches, in order; `dsum_NW` is the gradient of the new residual, added to dx."""
    rows, width = x_NW.shape
    sms = launch.multiprocessors(x_NW.device)
    dsum = dy_NW if dsum_NW is None else dsum_NW
    strides = (dy_NW.stride(0), x_NW.stride(0), dsum.stride(0), dx_NW.stride(0))
    add = {"ADD": dsum_NW is not None}
    tiles = launch.norm_tiles(width, rows, sms, x_NW.itemsize, backward=True)
    if tiles[0].cols > FUSED_BACKWARD:
        partials = max(1, min(cdiv(rows, ROWS_PER_PROGRAM), 64))
        rstd_N = torch.empty(rows, dtype=torch.float32, device=x_NW.device)
        partial_PW = torch.empty(partials, width, dtype=torch.float32, device=x_NW.device)
        return [
            Launch(_backward_wide, (rows,), (dy_NW, x_NW, weight_W, dsum, dx_NW, rstd_N, rows, width, *strides, eps),
                   {**add, "ROWS": 1, "COLS": SWEEP}, 8),
            Launch(_wide_partials, (cdiv(width, 1024), partials),
                   (dy_NW, x_NW, rstd_N, partial_PW, rows, width, dy_NW.stride(0), x_NW.stride(0),
                    cdiv(rows, partials)),
                   {"ROWS": 4, "COLS": 1024}, 4),
            _partials_launch(partial_PW, dweight_W),
        ]  # fmt: skip

    def build(tile: Tile) -> list[Launch]:
        partials = num_partials(rows, tile.rows, sms)
        partial_PW = torch.empty(partials, width, dtype=torch.float32, device=x_NW.device)
        args = (dy_NW, x_NW, weight_W, dsum, dx_NW, partial_PW, rows, width, *strides, eps)
        prefetch = tile.cols * x_NW.itemsize <= PREFETCHED
        constants = {**add, "PREFETCH": prefetch, "ROWS": tile.rows, "COLS": tile.cols}
        main = Launch(_backward, (partials,), args, constants, tile.warps)
        return [main, _partials_launch(partial_PW, dweight_W)]

    name = f"rms_norm backward add={dsum_NW is not None} {x_NW.dtype} {width}"
    return build(launch.pick(name, tiles, lambda tile: build(tile)[0], device=x_NW.device))


def _partials_launch(partial_PW: torch.Tensor, dweight_W: torch.Tensor) -> Launch:
    partials, width = partial_PW.shape
    height = min(64, power_of_two(partials))
    tile = {"INNER": min(8, height), "ROWS": height, "COLS": 32}
    return Launch(_sum_partials, (cdiv(width, 32),), (partial_PW, dweight_W, partials, width), tile, 4)
