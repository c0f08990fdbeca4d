"""RMSNorm, and residual addition fused into it: the operators, and what their benchmark needs.

The kernels, the formulas and the bytes are in `rms_norm_kernels`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from . import launch, plans, reference
from .benchmark import Case, Function, benchmark
from .launch import Launch
from .plans import Plans
from .rms_norm_kernels import backward_launches, forward_launch


def _check_shapes(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must match x: {tuple(x.shape)} {x.dtype}, got {tuple(residual.shape)} {residual.dtype}"
        )


_FORWARD, _BACKWARD = Plans(), Plans()


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    y = launch.like(x)
    key = (plans.signature(x, weight), eps)
    plan = _FORWARD.get(key)
    if plan is not None and plan(x, weight, y):
        return y
    _check_shapes(x, None, weight)
    launch.check(x, weight)
    if x.numel():
        rows = plans.distinct(launch.as_rows(x), weight.contiguous(), y.view(-1, x.shape[-1]))
        x_NW, weight_W, y_NW = rows
        _FORWARD.run(key, [forward_launch(x_NW, None, weight_W, y_NW, None, eps)], rows, (x, weight, y))
    return y


def _add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    y, total = launch.like(x), launch.like(x)
    key = (plans.signature(x, residual, weight), eps)
    plan = _FORWARD.get(key)
    if plan is not None and plan(x, residual, weight, y, total):
        return y, total
    _check_shapes(x, residual, weight)
    launch.check(x, residual, weight)
    if x.numel():
        out = (t.view(-1, x.shape[-1]) for t in (y, total))
        rows = plans.distinct(launch.as_rows(x), launch.as_rows(residual), weight.contiguous(), *out)
        x_NW, residual_NW, weight_W, y_NW, sum_NW = rows
        run = forward_launch(x_NW, residual_NW, weight_W, y_NW, sum_NW, eps)
        _FORWARD.run(key, [run], rows, (x, residual, weight, y, total))
    return y, total


def _norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, dsum: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dweight = launch.like(x), launch.like(weight)
    given = (dy, x, weight) if dsum is None else (dy, x, weight, dsum)
    key = (plans.signature(*given), eps)
    plan = _BACKWARD.get(key)
    if plan is not None and plan(*given, dx, dweight):
        return dx, dweight
    launch.check(*given)
    if not x.numel():
        return dx, dweight.zero_()
    upstream = [] if dsum is None else [launch.as_rows(dsum)]
    rows = plans.distinct(
        launch.as_rows(dy), launch.as_rows(x), weight.contiguous(), *upstream, dx.view(-1, x.shape[-1]), dweight
    )
    dy_NW, x_NW, weight_W, *dsums, dx_NW, dweight_W = rows
    launches = backward_launches(dy_NW, x_NW, weight_W, dsums[0] if dsums else None, dx_NW, dweight_W, eps)
    _BACKWARD.run(key, launches, rows, (*given, dx, dweight))
    return dx, dweight


def _run_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, dsum: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if plans.direct(dy, x, weight) and not torch.is_grad_enabled():
        return _norm_backward(dy, x, weight, dsum, eps)
    dx, dweight = norm_backward_op(dy, x, weight, dsum, eps)
    return dx, dweight


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate_norm(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight = _run_backward(dy, x, weight, None, ctx.eps)
    return dx, dweight, None


def _save_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _differentiate_add_norm(
    ctx: Any, dy: torch.Tensor | None, dsum: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return dsum, dsum, None, None
    x, weight = ctx.saved_tensors
    dx, dweight = _run_backward(dy, x, weight, dsum, ctx.eps)
    return dx, dx, dweight, None


norm_backward_op = launch.register(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor? dsum, float eps) -> (Tensor, Tensor)",
    _norm_backward,
    lambda dy, x, weight, dsum, eps: (launch.like(x), launch.like(weight)),
)
norm_op = launch.register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    _norm,
    lambda x, weight, eps: launch.like(x),
    setup=_save_norm,
    backward=_differentiate_norm,
)
add_norm_op = launch.register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _add_norm,
    lambda x, residual, weight, eps: (launch.like(x), launch.like(x)),
    setup=_save_add_norm,
    backward=_differentiate_add_norm,
)


class _RMSNorm(torch.autograd.Function):
    """`rms_norm` without the dispatcher (see `plans.direct`): the same kernels, the same formulas."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _differentiate_norm(ctx, *grads)


class _AddRMSNorm(torch.autograd.Function):
    """`add_rms_norm` without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, total = _add_norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return _differentiate_add_norm(ctx, *grads)


class _SumRMSNorm(torch.autograd.Function):
    """(norm(x), x): `add_rms_norm` where x is the sum already, which no second tensor then holds."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return (_norm if plans.direct(x, weight) else norm_op)(x, weight, eps), x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        dx, _, dweight, _ = _differentiate_add_norm(ctx, *grads)
        return dx, dweight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of x [..., W] by weight [W]; returns a contiguous tensor of x's shape and type.

    Raises ValueError for shapes that do not fit, TypeError for types other than bf16, fp16 and fp32.
    """
    result: torch.Tensor
    if plans.direct(x, weight):
        if not torch.is_grad_enabled():
            return _norm(x, weight, eps)
        result = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return result
    _check_shapes(x, None, weight)
    result = norm_op(x, weight, eps)
    return result


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """s = x + residual, and its RMSNorm: returns (norm(s), s), both [..., W] of x's type. Without a residual x is s and
    comes back; the bits are those of a residual of zeros, backward too. Raises as `rms_norm` does."""
    if residual is None:
        if not torch.is_grad_enabled():
            return rms_norm(x, weight, eps), x
        _check_shapes(x, None, weight)
        normed, total = _SumRMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return normed, total
    if plans.direct(x, residual, weight):
        if not torch.is_grad_enabled():
            return _add_norm(x, residual, weight, eps)
        normed, total = _AddRMSNorm.apply(x, residual, weight, eps)  # type: ignore[no-untyped-call]
        return normed, total
    _check_shapes(x, residual, weight)
    normed, total = add_norm_op(x, residual, weight, eps)
    return normed, total


# ---------------------------------------------------------------- benchmark


def _arguments(case: Case, device: str) -> tuple[Any, ...]:
    row, weight = case.normal(case.rows, case.width, device=device), case.normal(case.width, device=device)
    if case.op == "rms_norm":
        return row, weight, 1e-5
    return row, case.normal(case.rows, case.width, device=device), weight, 1e-5


def _launches(case: Case, device: str) -> list[Launch]:
    x, y, residual, total = (torch.empty(case.rows, case.width, dtype=case.dtype, device=device) for _ in range(4))
    weight, dweight = (torch.empty(case.width, dtype=case.dtype, device=device) for _ in range(2))
    add = case.op == "add_rms_norm"
    if case.direction == "forward":
        return [forward_launch(x, residual if add else None, weight, y, total if add else None, 1e-5)]
    return backward_launches(y, x, weight, residual if add else None, total, dweight, 1e-5)


def _other_bytes(case: Case, launches: list[Launch]) -> int:
    """The weight, and in the backward its gradient and the partials, written and read."""
    size = case.dtype.itemsize
    if case.direction == "forward":
        return case.width * size
    partials = 2 * int(launches[-1].args[0].numel()) * 4
    if len(launches) == 3:  # the wide backward: x and dy once more for dweight; rstd, written once and read by block
        rstd = (1 + launches[1].grid[0]) * case.rows * 4
        return 2 * case.elements * size + rstd + partials + 2 * case.width * size
    return partials + 2 * case.width * size


def _liger() -> Function:
    """Liger's, casting as Llama's does."""
    norms = importlib.import_module("liger_kernel.ops.rms_norm")
    return lambda x, w, eps: norms.LigerRMSNormFunction.apply(x, w, eps, 0.0, "llama", False)


benchmark(
    "rms_norm",
    rms_norm,
    reference.rms_norm,
    limits={"forward": 2, "backward": 3},
    width=lambda shape: shape.hidden,
    arguments=_arguments,
    launches=_launches,
    other_bytes=_other_bytes,
    narrow={"_forward": 1, "_backward": 2, "_forward_wide": 0, "_backward_wide": 1, "_wide_partials": 5,
            "_sum_partials": 1},
    liger=_liger,
)  # fmt: skip
benchmark(
    "add_rms_norm",
    add_rms_norm,
    reference.add_rms_norm,
    limits={"forward": 4, "backward": 4},
    width=lambda shape: shape.hidden,
    arguments=_arguments,
    launches=_launches,
    other_bytes=_other_bytes,
)
