"""Cross entropy over a vocabulary, turning logits into their own gradient in place.

    lse = log sum exp(x);  loss = lse - x[target];  dx = w * (exp(x - lse) - [column = target])

One program per row. The first sweep finds the maximum and the sum together (online softmax, Milakov and Gimelshein
2018, arXiv:1805.02867), each lane keeping its own pair so that threads meet once per row and not once per block; the
second writes the gradient over the logits. It walks backwards: the end of the row is what the caches hold last. A row
of 100,352 bf16 logits is 200 kB, and one program per multiprocessor keeps the rows in flight inside L2, so that
memory sees one read and one write: 4 bytes per logit in bf16. A row of weight 0 is not read, only zeroed.
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
from .launch import Launch, power_of_two
from .plans import Plans

#: Columns per step of a sweep (16 logits for each of 1,024 threads).
SWEEP = 16384
#: A lane folds this many columns before it rescales its running sum.
FOLD = 2
#: Any finite number below every logit: a lane that has seen nothing must not compute inf - inf.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _cross_entropy(logits_ptr, target_ptr, weight_ptr, loss_ptr, width, stride, FOLD: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    target = tl.load(target_ptr + row).to(tl.int64)
    weight = tl.load(weight_ptr + row).to(tl.float32)
    LANES: tl.constexpr = COLS // FOLD
    col_KV = tl.arange(0, FOLD)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    steps = tl.cdiv(width, COLS)
    if (weight == 0.0) | (target < 0):
        for step in range(0, steps):
            here_KV = step * COLS + col_KV
            zero_KV = tl.zeros([FOLD, LANES], tl.float32).to(logits_ptr.dtype.element_ty)
            tl.store(row_ptr + here_KV, zero_KV, mask=here_KV < width)
        tl.store(loss_ptr + row, 0.0)
    else:
        known = target < width
        at_target = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)
        most_V = tl.full([LANES], LOWEST, tl.float32)
        total_V = tl.zeros([LANES], tl.float32)
        for step in range(0, steps):
            here_KV = step * COLS + col_KV
            x_KV = tl.load(row_ptr + here_KV, mask=here_KV < width, other=float("-inf")).to(tl.float32)
            higher_V = tl.maximum(most_V, tl.max(x_KV, axis=0))
            total_V = total_V * tl.exp(most_V - higher_V) + tl.sum(tl.exp(x_KV - higher_V[None, :]), axis=0)
            most_V = higher_V
        most = tl.max(most_V, axis=0)
        # Not lse = most + log(total): its rounding, an error of the size of the largest logit, would go into every
        # loss.
        total = tl.sum(total_V * tl.exp(most_V - most), axis=0)
        scale = 1.0 / total
        # The logit at the target was read before anyone overwrites it, and every thread has read its own columns.
        tl.debug_barrier()
        for back in range(0, steps):
            here_KV = (steps - 1 - back) * COLS + col_KV
            inside_KV = here_KV < width
            x_KV = tl.load(row_ptr + here_KV, mask=inside_KV, other=float("-inf")).to(tl.float32)
            dx_KV = weight * (tl.exp(x_KV - most) * scale - tl.where(here_KV == target, 1.0, 0.0))
            tl.store(row_ptr + here_KV, dx_KV.to(logits_ptr.dtype.element_ty), mask=inside_KV)
        tl.store(loss_ptr + row, tl.log(total) - (at_target - most))


def cross_entropy_launch(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor, losses_N: torch.Tensor
) -> Launch:
    """The launch that fills losses_N and turns logits_NV into its gradient. Never tuned: it overwrites its input."""
    rows, width = logits_NV.shape
    cols = min(SWEEP, max(FOLD, power_of_two(width)))
    return Launch(
        _cross_entropy,
        (rows,),
        (logits_NV, targets_N, weights_N, losses_N, width, logits_NV.stride(0)),
        {"FOLD": FOLD, "COLS": cols},
        max(1, min(32, cols // 512)),
    )


_PLANS = Plans()


def _cross_entropy_in_place(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if not logits.numel():
        launch.check(logits, weights)
        return logits.new_zeros(logits.shape[0], dtype=torch.float32)
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)  # each row's program writes its own
    given = (logits, targets, weights)
    key = plans.signature(*given)
    plan = _PLANS.get(key)
    if plan is not None and plan(*given, losses):
        return losses
    _check_shapes(*given)
    launch.check(logits, weights)
    arguments = plans.distinct(logits, targets.contiguous(), weights.contiguous(), losses)
    _PLANS.run(key, [cross_entropy_launch(*arguments)], arguments, (*given, losses))
    return losses


cross_entropy_op = launch.register(
    "cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor weights) -> Tensor",
    _cross_entropy_in_place,
    lambda logits, targets, weights: logits.new_empty(logits.shape[0], dtype=torch.float32),
    mutated=1,
)


def _check_shapes(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or weights.shape != logits.shape[:1]:
        raise ValueError(
            f"logits [N, V], targets [N] and weights [N], got {tuple(logits.shape)}, {tuple(targets.shape)} and "
            f"{tuple(weights.shape)}"
        )
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError("logits need unit stride along the vocabulary: they are overwritten in place")


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Token losses of logits [N, V], which become the gradient of their weighted sum.

    logits [N, V]: bf16, fp16 or fp32, unit stride along V, OVERWRITTEN by d(sum of weights * losses)/d(logits). targets
    [N]: integers below V, negative for rows to ignore. weights [N]: float, divided by whatever the loss is divided by.
    Returns losses [N] in nats, float32, not weighted: log-sum-exp - target's logit; 0 where the weight is 0 or the
    target negative (such a row isn't read); NaN where the target is V or more. A caller of an output loss computes
    its gradient in its forward; autograd must therefore not follow the logits (RuntimeError), and shapes that do not
    fit raise ValueError.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        raise RuntimeError("cross_entropy_ overwrites the logits with their gradient: pass logits outside autograd")
    if plans.direct(logits, targets, weights):
        launch.count_writes(logits)
        return _cross_entropy_in_place(logits, targets, weights)
    _check_shapes(logits, targets, weights)
    losses: torch.Tensor = cross_entropy_op(logits, targets, weights)
    return losses


# ---------------------------------------------------------------- benchmark


def _arguments(case: Case, device: str) -> tuple[Any, ...]:
    targets = torch.randint(0, case.width, (case.rows,), device=device)
    logits = case.normal(case.rows, case.width, device=device, grad=False)
    return logits, targets, torch.ones(case.rows, device=device)


def _launches(case: Case, device: str) -> list[Launch]:
    logits = torch.empty(case.rows, case.width, dtype=case.dtype, device=device)
    targets = torch.empty(case.rows, dtype=torch.int64, device=device)
    weights, losses = (torch.empty(case.rows, device=device) for _ in range(2))
    return [cross_entropy_launch(logits, targets, weights, losses)]


def _liger() -> Function:
    """Liger's writes the gradient into the logits as ours does, but takes no weights."""
    losses = importlib.import_module("liger_kernel.ops.cross_entropy")

    def loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> Any:
        # The gradient is computed, in the forward pass, only for logits that require one.
        with torch.enable_grad():
            given = logits.detach().requires_grad_()
            return losses.LigerCrossEntropyFunction.apply(given, targets, None, -100, 0.0, 0.0, "sum")[0]

    return loss


benchmark(
    "cross_entropy",
    cross_entropy_,
    reference.cross_entropy_,
    limits={"both": 2},
    width=lambda shape: shape.vocabulary,
    arguments=_arguments,
    launches=_launches,
    other_bytes=lambda case, launches: case.rows * (8 + 4 + 4),
    narrow={"_cross_entropy": 5},
    most_rows=1024,  # the output loss works on chunks of so many
    liger=_liger,
)
