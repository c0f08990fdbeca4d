"""Rotary position embedding of q and k in one launch (Su et al. 2021, arXiv:2104.09864; Llama's rotate-half pairing).

The D elements of a head are pairs (x[i], x[i + D/2]), rotated by the angle of the token's own position:

    y[i] = x[i] * cos[p, i] - x[i + D/2] * sin[p, i]        y[i + D/2] = x[i + D/2] * cos[p, i] + x[i] * sin[p, i]

q [.., S, H, D] and k [.., S, K, D] may be strided views of a fused QKV projection: no copy is made. positions [.., S]
picks the row of the tables cos and sin [P, D/2] (float32), so packed documents each start at 0. The gradient is the
rotation by the opposite angle, by the same kernel. Bytes per element in bf16: 4 forward, 4 backward; the tables (8 D/2
bytes a position, shared by all heads and layers) stay in L2.

`rope` makes new tensors. `rope_` rotates in place and refuses tensors that autograd follows: q and k are two views of
one projection, and rewriting them would have to be told to their base.
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
from .launch import Launch, Tile, cdiv, power_of_two
from .plans import Plans

# ---------------------------------------------------------------- kernel


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, cos_TD, sin_TD, x_TD, y_TD, there_T, col_D, first, heads, x_head, y_head, half, COUNT: tl.constexpr
):
    for i in tl.static_range(COUNT):
        head = first + i
        here_TD = there_T[:, None] & (col_D < tl.where(head < heads, half, 0))[None, :]
        # 64 bits: a head's offset is a stride times a count like any other.
        from_TD = x_ptr + head.to(tl.int64) * x_head + x_TD
        to_TD = y_ptr + head.to(tl.int64) * y_head + y_TD
        low_TD = tl.load(from_TD, mask=here_TD, other=0.0).to(tl.float32)
        high_TD = tl.load(from_TD + half, mask=here_TD, other=0.0).to(tl.float32)
        kind = y_ptr.dtype.element_ty
        tl.store(to_TD, (low_TD * cos_TD - high_TD * sin_TD).to(kind), mask=here_TD)
        tl.store(to_TD + half, (high_TD * cos_TD + low_TD * sin_TD).to(kind), mask=here_TD)


@triton.jit
def _rope(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, position_ptr, tokens, sequence, table, half,
    q_batch, q_token, q_head, k_batch, k_token, k_head, qo_batch, qo_token, qo_head, ko_batch, ko_token, ko_head,
    q_heads, k_heads,
    INVERSE: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr, Q_EACH: tl.constexpr, K_EACH: tl.constexpr,
):  # fmt: skip
    token_T = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    group = tl.program_id(1)
    col_D = tl.arange(0, HALF)
    there_T = token_T < tokens
    position_T = tl.load(position_ptr + token_T, mask=there_T, other=0).to(tl.int64)
    # A position outside the table must be seen, not read from someone else's memory: it gives NaN.
    known_T = there_T & (position_T >= 0) & (position_T < table)
    known_TD = known_T[:, None] & (col_D < half)[None, :]
    angle_TD = position_T[:, None] * half + col_D[None, :]
    cos_TD = tl.load(cos_ptr + angle_TD, mask=known_TD, other=float("nan"))
    sin_TD = tl.load(sin_ptr + angle_TD, mask=known_TD, other=float("nan"))
    if INVERSE:
        sin_TD = -sin_TD
    batch_T = token_T // sequence
    step_T = token_T % sequence
    q_TD = (batch_T * q_batch + step_T * q_token)[:, None] + col_D[None, :]
    k_TD = (batch_T * k_batch + step_T * k_token)[:, None] + col_D[None, :]
    qo_TD = (batch_T * qo_batch + step_T * qo_token)[:, None] + col_D[None, :]
    ko_TD = (batch_T * ko_batch + step_T * ko_token)[:, None] + col_D[None, :]
    _rotate_heads(
        q_ptr, q_out_ptr, cos_TD, sin_TD, q_TD, qo_TD, there_T, col_D, group * Q_EACH, q_heads, q_head, qo_head, half,
        Q_EACH,
    )  # fmt: skip
    _rotate_heads(
        k_ptr, k_out_ptr, cos_TD, sin_TD, k_TD, ko_TD, there_T, col_D, group * K_EACH, k_heads, k_head, ko_head, half,
        K_EACH,
    )  # fmt: skip


# ---------------------------------------------------------------- launch


def rope_launch(
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    q_out_BSHD: torch.Tensor,
    k_out_BSKD: torch.Tensor,
    cos_PD: torch.Tensor,
    sin_PD: torch.Tensor,
    positions_BS: torch.Tensor,
    inverse: bool,
) -> Launch:
    """The launch that rotates q and k into q_out and k_out (which may be q and k themselves).

    A program takes a block of tokens and a group of heads, about four q heads at a time: it reads its tokens' angles
    once, and there are enough programs to fill a card from 2,000 tokens on.
    """
    batch, sequence, q_heads, head_dim = q_BSHD.shape
    k_heads = k_BSKD.shape[2]
    half = head_dim // 2
    groups = cdiv(q_heads, 4)
    args = (
        q_BSHD, k_BSKD, q_out_BSHD, k_out_BSKD, cos_PD, sin_PD, positions_BS, batch * sequence, sequence,
        cos_PD.shape[0], half, *q_BSHD.stride()[:3], *k_BSKD.stride()[:3], *q_out_BSHD.stride()[:3],
        *k_out_BSKD.stride()[:3], q_heads, k_heads,
    )  # fmt: skip

    def build(tile: Tile) -> Launch:
        each = {"Q_EACH": cdiv(q_heads, groups), "K_EACH": cdiv(k_heads, groups)}
        return Launch(
            _rope,
            (cdiv(batch * sequence, tile.rows), groups),
            args,
            {"INVERSE": inverse, "TOKENS": tile.rows, "HALF": tile.cols, **each},
            tile.warps,
        )

    cols = power_of_two(half)
    tiles = [Tile(max(1, 1024 * scale // cols), cols, 4 * scale) for scale in (1, 2)]
    if q_out_BSHD.data_ptr() == q_BSHD.data_ptr():  # in place: trying candidates would rotate again and again
        return build(tiles[0])
    name = f"rope {q_BSHD.dtype} {q_heads} {k_heads} {head_dim}"
    return build(launch.pick(name, tiles, build, device=q_BSHD.device))


# ---------------------------------------------------------------- operators


def _as_batch(x: torch.Tensor) -> torch.Tensor:
    """[.., S, H, D] as [B, S, H, D] with unit stride along D; a view wherever one batch stride describes it."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() == 3:
        return x.unsqueeze(0)
    return x if x.dim() == 4 else x.flatten(0, -4)


def _prepare(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    launch.check(q, k, cos, sin)
    return (
        _as_batch(q), _as_batch(k), cos.float().contiguous(), sin.float().contiguous(),
        positions.expand(q.shape[:-2]).contiguous(),
    )  # fmt: skip


_NEW, _IN_PLACE = Plans(), Plans()


def _rope_new(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = launch.like(q), launch.like(k)
    given = (q, k, cos, sin, positions)
    key = (plans.signature(*given), inverse)
    plan = _NEW.get(key)
    if plan is not None and plan(*given, q_out, k_out):
        return q_out, k_out
    _check_shapes(*given)
    if q.numel() or k.numel():
        q4, k4, *tables = _prepare(*given)
        arguments = plans.distinct(q4, k4, *tables, q_out.view(q4.shape), k_out.view(k4.shape))
        q4, k4, cos4, sin4, places, q_new, k_new = arguments
        run = rope_launch(q4, k4, q_new, k_new, cos4, sin4, places, inverse)
        _NEW.run(key, [run], arguments, (*given, q_out, k_out))
    return q_out, k_out


def _rope_in_place(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> None:
    given = (q, k, cos, sin, positions)
    key = plans.signature(*given)
    plan = _IN_PLACE.get(key)
    if plan is not None and plan(*given):
        return
    _check_shapes(*given)
    if q.numel() or k.numel():
        arguments = plans.distinct(*_prepare(*given))
        q4, k4, cos4, sin4, places = arguments
        if q4.data_ptr() != q.data_ptr() or k4.data_ptr() != k.data_ptr():
            raise ValueError("rope_ needs q and k with unit stride along the head dimension")
        _IN_PLACE.run(key, [rope_launch(q4, k4, q4, k4, cos4, sin4, places, False)], arguments, given)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, cos, sin, positions, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)
    ctx.shapes = (q.shape, k.shape)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dq: torch.Tensor | None, dk: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    present = dq if dq is not None else dk
    if present is None:
        return (None,) * 6
    # One of the two missing (a probe of q alone): no heads of it are rotated.
    dq_in, dk_in = (
        present.new_empty((*shape[:-2], 0, shape[-1])) if d is None else d
        for d, shape in zip((dq, dk), ctx.shapes, strict=True)
    )
    if plans.direct(dq_in, dk_in) and not torch.is_grad_enabled():
        cos, sin, positions = ctx.saved_tensors
        q_out, k_out = _rope_new(dq_in, dk_in, cos, sin, positions, not ctx.inverse)
    else:
        q_out, k_out = rope_op(dq_in, dk_in, *ctx.saved_tensors, not ctx.inverse)
    return (None if dq is None else q_out), (None if dk is None else k_out), None, None, None, None


rope_op = launch.register(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, bool inverse) -> (Tensor, Tensor)",
    _rope_new,
    lambda q, k, cos, sin, positions, inverse: (launch.like(q), launch.like(k)),
    setup=_save,
    backward=_differentiate,
)
rope_in_place_op = launch.register(
    "rope_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor positions) -> ()",
    _rope_in_place,
    lambda q, k, cos, sin, positions: None,
    mutated=2,
)


def _check_shapes(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> None:
    head_dim = q.shape[-1]
    if q.dim() < 3 or k.dim() != q.dim() or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != head_dim or head_dim % 2:
        raise ValueError(f"q [.., S, H, D] and k [.., S, K, D] with D even, got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.dtype != k.dtype:
        raise TypeError(f"q and k must have one type, got {q.dtype} and {k.dtype}")
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] != head_dim // 2:
        raise ValueError(f"cos and sin must be [P, {head_dim // 2}], got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if positions.is_floating_point() or positions.shape != q.shape[:-2][-positions.dim() :]:
        raise ValueError(f"positions must be integers of shape {tuple(q.shape[:-2])}, got {tuple(positions.shape)}")


class _Rope(torch.autograd.Function):
    """`rope` without the dispatcher (see `plans.direct`)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        _save(ctx, inputs, None)
        return _rope_new(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return _differentiate(ctx, *grads)


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q [.., S, H, D] and k [.., S, K, D]; returns new contiguous tensors of their shapes and type.

    cos, sin: [P, D/2] float32 tables (cos[p, i] = cos(p * theta^(-2i/D))); positions: integers [.., S] or [S], each
    below P (one outside the table gives NaN). Raises ValueError or TypeError for shapes and types that do not fit.
    """
    rotated: tuple[torch.Tensor, torch.Tensor]
    if plans.direct(q, k, cos, sin, positions):
        rotate: Any = _Rope.apply if torch.is_grad_enabled() else _rope_new
        rotated = rotate(q, k, cos, sin, positions, False)
        return rotated
    _check_shapes(q, k, cos, sin, positions)
    rotated = rope_op(q, k, cos, sin, positions, False)
    return rotated


def rope_(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> None:
    """Rotate q and k in place (see `rope`): for inference. Raises RuntimeError for tensors that autograd follows."""
    _check_shapes(q, k, cos, sin, positions)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise RuntimeError("rope_ works in place, outside autograd: use rope() for tensors that require a gradient")
    if plans.direct(q, k, cos, sin, positions):
        launch.count_writes(q, k)
        _rope_in_place(q, k, cos, sin, positions)
        return
    rope_in_place_op(q, k, cos, sin, positions)


# ---------------------------------------------------------------- benchmark


def _arguments(case: Case, device: str) -> tuple[Any, ...]:
    s, rows = case.shape, case.rows
    qkv = case.normal(1, rows, s.heads + 2 * s.kv_heads, s.head_dim, device=device)
    angles = torch.rand(s.sequence, s.head_dim // 2, device=device) * 6.28
    positions = torch.arange(rows, device=device).remainder(s.sequence).view(1, -1)
    return qkv.narrow(2, 0, s.heads), qkv.narrow(2, s.heads, s.kv_heads), angles.cos(), angles.sin(), positions


def _launches(case: Case, device: str) -> list[Launch]:
    s = case.shape
    # As the model does it: q and k straight out of a fused projection, whose heads for v follow.
    qkv = torch.empty(1, case.rows, s.heads + 2 * s.kv_heads, s.head_dim, dtype=case.dtype, device=device)
    q, k = qkv.narrow(2, 0, s.heads), qkv.narrow(2, s.heads, s.kv_heads)
    q_out, k_out = (torch.empty(x.shape, dtype=case.dtype, device=device) for x in (q, k))
    cos, sin = (torch.empty(s.sequence, s.head_dim // 2, device=device) for _ in range(2))
    positions = torch.arange(case.rows, device=device).remainder(s.sequence).view(1, -1)
    return [rope_launch(q, k, q_out, k_out, cos, sin, positions, case.direction == "backward")]


def _liger() -> Function:
    ropes = importlib.import_module("liger_kernel.ops.rope")

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> Any:
        # It wants [B, H, S, D] and angles [B, S, D] of both halves; preparing them is part of what using it costs.
        both = [torch.cat((t[positions], t[positions]), -1).to(q.dtype) for t in (cos, sin)]
        return ropes.LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *both)

    return rotate


benchmark(
    "rope",
    rope,
    reference.rope,
    limits={"forward": 2, "backward": 2},
    width=lambda shape: (shape.heads + shape.kv_heads) * shape.head_dim,
    arguments=_arguments,
    launches=_launches,
    other_bytes=lambda case, launches: (
        launches[0].grid[1] * case.rows * 8 + 2 * case.shape.sequence * (case.shape.head_dim // 2) * 4
    ),
    narrow={"_rope": 2},
    liger=_liger,
)
