"""The one door to fused operators: Triton kernels on CUDA, compiled loops on a CPU in bfloat16, plain torch elsewhere.

`LUMINA_KERNELS=torch|triton|interpret` forces a path ("interpret" runs the Triton kernels in Triton's interpreter on
CPU tensors, for tests). All paths compute in float32 and round once; tests hold them together.

Shape suffixes as in transformer.py; T is any number of leading rows.
"""

from __future__ import annotations

import importlib
import math
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lumina.config import RopeScaling, UserError
from lumina.model import cpu

# Chosen and imported once, by `bind`, and plain globals from then on: torch.compile guards on them, where a cached
# import in the traced region is a break of the graph at every operator.
_chosen: str | None = None
_kernels: ModuleType | None = None


def bind() -> None:
    """Read LUMINA_KERNELS and import the Triton kernels if this process may use them; later calls do nothing."""
    if _chosen is None:
        _choose()
    if _chosen in ("triton", "interpret") or (_chosen == "auto" and (torch.version.cuda or torch.version.hip)):
        _triton()


def _choose() -> str:
    global _chosen
    choice = os.environ.get("LUMINA_KERNELS", "auto")
    if choice not in ("auto", "torch", "triton", "interpret"):
        raise UserError(f"LUMINA_KERNELS={choice} is not a path. Use torch, triton or interpret, or unset it.")
    if choice == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is first imported
    _chosen = choice
    return choice


def _choice() -> str:
    return _choose() if _chosen is None else _chosen


def _triton() -> ModuleType:
    global _kernels
    if _kernels is None:
        _kernels = importlib.import_module("lumina.kernels")
    return _kernels


def _use_triton(x: Tensor) -> bool:
    choice = _choice()
    return choice in ("triton", "interpret") or (choice == "auto" and x.is_cuda)


def _use_cpu(*tensors: Tensor) -> bool:
    return _choice() == "auto" and cpu.usable(*tensors)


# --- RMSNorm --------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    """float32 for the half precisions; float32 and float64 stay as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _cpu_norm(x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, x + residual, reciprocal root mean square of each row)."""
    x, weight_D = x.contiguous(), weight_D.contiguous()
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    total = x if residual is None else torch.empty_like(x)
    y, rstd = torch.empty_like(x), torch.empty(rows, dtype=torch.float32)
    added = None if residual is None else residual.contiguous()
    cpu.call("lumina_rms_norm", x, added, weight_D, total, y, rstd, rows, width, eps)
    return y, total, rstd


def _cpu_norm_backward(ctx: Any, dy: Tensor, dtotal: Tensor | None) -> tuple[Tensor, Tensor]:
    total, weight_D, rstd = ctx.saved_tensors
    dx, width = torch.empty_like(total), total.shape[-1]
    partial = torch.empty(torch.get_num_threads(), width, dtype=torch.float32)
    upstream = None if dtotal is None else dtotal.contiguous()
    dy, weight_D = dy.contiguous(), weight_D.contiguous()
    cpu.call("lumina_rms_norm_backward", dy, upstream, total, weight_D, rstd, dx, partial, len(rstd), width)
    return dx, partial.sum(0).to(weight_D.dtype)


class _CpuRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, total, rstd = _cpu_norm(x, None, weight_D, eps)
        ctx.save_for_backward(total, weight_D, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_cpu_norm_backward(ctx, grads[0], None), None


class _CpuAddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, total, rstd = _cpu_norm(x, residual, weight_D, eps)
        ctx.save_for_backward(total, weight_D, rstd)
        ctx.added = residual is not None
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight_D = _cpu_norm_backward(ctx, grads[0], grads[1])
        return dx, dx if ctx.added else None, dweight_D, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv:1910.07467). Any float dtype, float32 inside."""
    if _use_triton(x):
        return _triton().rms_norm(x, weight_D, eps)  # type: ignore[no-any-return]
    if _use_cpu(x, weight_D):
        return _CpuRMSNorm.apply(x, weight_D, eps)  # type: ignore[no-any-return, no-untyped-call]
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_D.to(wide.dtype)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), the sum rounded to the dtype of x before it is normed. Without a residual
    x is the sum and comes back as it is: no second tensor holds it, and the bits are those of a residual of zeros."""
    if _use_triton(x):
        return _triton().add_rms_norm(x, residual, weight_D, eps)  # type: ignore[no-any-return]
    if _use_cpu(x, weight_D) and (residual is None or _use_cpu(residual)):
        return _CpuAddRMSNorm.apply(x, residual, weight_D, eps)  # type: ignore[no-any-return, no-untyped-call]
    total = x if residual is None else x + residual
    return rms_norm(total, weight_D, eps), total


# --- Rotary positions -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of each token's angles: float32 (B, S, d/2); made once for all layers.

    `tables` is what the Triton kernel looks a token up in, where that path is taken: the same with one row a token
    (B*S, d/2) twice, and each token's row, int64 (B, S).
    """

    cos_BSh: Tensor
    sin_BSh: Tensor
    tables: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls,
        positions_BS: Tensor,
        head_dim: int,
        theta: float,
        scaling: RopeScaling | None = None,
        wide: bool = False,
    ) -> Rotary:
        """Angles positions * theta^(-2i/d), in float32 as Llama computes them (arXiv:2104.09864, section 3.2.2), or
        `wide`: in float64, for contexts whose angles float32 does not hold."""
        dtype = torch.float64 if wide else torch.float32
        exponent_h = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=dtype) / head_dim
        frequency_h = 1.0 / theta**exponent_h
        if scaling is not None:
            frequency_h = _slowed(frequency_h, theta, scaling)
        cos_BSh, sin_BSh = _turned(positions_BS, frequency_h)
        if scaling is not None and scaling.type == "yarn":
            # Scores are multiplied by its square: the temperature of YaRN, section 3.4.
            factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
            cos_BSh, sin_BSh = cos_BSh.mul_(factor), sin_BSh.mul_(factor)
        return cls(cos_BSh, sin_BSh, _tables(cos_BSh, sin_BSh) if _use_triton(cos_BSh) else None)

    @property
    def width(self) -> int:
        """How much of a head is rotated."""
        return 2 * self.cos_BSh.shape[-1]


# Angles in float64 exist for so many tokens at a time: 8 MiB at a head of 128, where 1 M tokens would take 512.
_ANGLES_AT_ONCE = 2**14


def _turned(positions_BS: Tensor, frequency_h: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions * frequency, float32, of angles in the frequencies' precision."""
    if frequency_h.dtype is torch.float32:
        angles_BSh = positions_BS.unsqueeze(-1).float() * frequency_h
        return angles_BSh.cos(), angles_BSh.sin()
    shape = *positions_BS.shape, len(frequency_h)
    cos_BSh, sin_BSh = (torch.empty(shape, device=positions_BS.device) for _ in range(2))
    by_token = positions_BS.flatten(), cos_BSh.flatten(0, 1), sin_BSh.flatten(0, 1)
    for positions_t, cos_th, sin_th in zip(*(torch.split(x, _ANGLES_AT_ONCE) for x in by_token), strict=True):
        angles_th = positions_t.unsqueeze(-1) * frequency_h
        cos_th.copy_(angles_th.cos())
        sin_th.copy_(angles_th.sin_())
    return cos_BSh, sin_BSh


def _tables(cos_BSh: Tensor, sin_BSh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    cos_Th, sin_Th = cos_BSh.flatten(0, 1), sin_BSh.flatten(0, 1)
    return cos_Th, sin_Th, torch.arange(cos_Th.shape[0], device=cos_Th.device).view(cos_BSh.shape[:2])


def _slowed(frequency_h: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Frequencies for a longer context (see RopeScaling), in the precision of those given; operations in the order of
    the methods' own code, so that the float32 results are its very bits."""
    if scaling.type == "dynamic":
        return frequency_h
    if scaling.type == "yarn":
        return _slowed_by_parts(theta, scaling, frequency_h)
    slow_h = frequency_h / scaling.factor
    if scaling.type == "linear":
        return slow_h
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    assert low is not None
    assert high is not None
    assert original is not None
    length_h = 2 * math.pi / frequency_h  # tokens for a whole turn
    kept_h = (original / length_h - low) / (high - low)
    between_h = (1 - kept_h) * slow_h + kept_h * frequency_h
    frequency_h = torch.where(length_h > original / high, between_h, frequency_h)
    return torch.where(length_h > original / low, slow_h, frequency_h)


def _slowed_by_parts(theta: float, scaling: RopeScaling, frequency_h: Tensor) -> Tensor:
    """YaRN's frequencies (arXiv:2309.00071, section 3.2), as many and in the precision of those given."""
    width, dtype, device = 2 * len(frequency_h), frequency_h.dtype, frequency_h.device
    original = scaling.original_max_position_embeddings
    assert original is not None
    # The dimension, not a whole number, whose frequency turns so many times within the original context.
    at_fast, at_slow = (
        width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        at_fast, at_slow = math.floor(at_fast), math.ceil(at_slow)
    first, last = max(at_fast, 0), min(at_slow, width - 1)
    if first == last:
        last += 0.001
    period_h = theta ** (torch.arange(0, width, 2, dtype=dtype, device=device) / width)
    ramp_h = (torch.arange(width // 2, dtype=dtype, device=device) - first) / (last - first)
    kept_h = 1 - ramp_h.clamp(0, 1)
    return 1.0 / (scaling.factor * period_h) * (1 - kept_h) + 1.0 / period_h * kept_h


def _rope_torch(x_BSnd: Tensor, rotary: Rotary) -> Tensor:
    first, second = _wide(x_BSnd).chunk(2, -1)
    cos, sin = rotary.cos_BSh[:, :, None].to(first.dtype), rotary.sin_BSh[:, :, None].to(first.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BSnd.dtype)


def _cpu_rope(x_BSnd: Tensor, cos_BSh: Tensor, sin_BSh: Tensor, sign: float) -> Tensor:
    if x_BSnd.stride(-1) != 1 or x_BSnd.stride(0) != x_BSnd.shape[1] * x_BSnd.stride(1):
        x_BSnd = x_BSnd.contiguous()
    batch, length, heads, width = x_BSnd.shape
    out = torch.empty(x_BSnd.shape, dtype=x_BSnd.dtype)
    strides = x_BSnd.stride(1), x_BSnd.stride(2)
    cpu.call("lumina_rope", x_BSnd, out, cos_BSh, sin_BSh, batch * length, heads, width // 2, *strides, sign)
    return out


class _CpuRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSnd: Tensor, cos_BSh: Tensor, sin_BSh: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BSh, sin_BSh)
        return _cpu_rope(x_BSnd, cos_BSh, sin_BSh, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_BSh, sin_BSh = ctx.saved_tensors
        return _cpu_rope(grads[0], cos_BSh, sin_BSh, -1.0), None, None


def rope(q_BSHd: Tensor, k_BSKd: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their tokens' angles (rotate-half), or as much of each head as there are angles for. Inputs may
    be strided views of one projection."""
    if rotary.width < q_BSHd.shape[-1]:
        turned = rope(q_BSHd[..., : rotary.width], k_BSKd[..., : rotary.width], rotary)
        q_BSHd, k_BSKd = (
            torch.cat((t, x[..., rotary.width :]), -1) for t, x in zip(turned, (q_BSHd, k_BSKd), strict=True)
        )
        return q_BSHd, k_BSKd
    if _use_triton(q_BSHd):
        return _triton_rope(q_BSHd, k_BSKd, rotary)
    if _use_cpu(q_BSHd, k_BSKd):
        cos_BSh, sin_BSh = (t.expand(q_BSHd.shape[0], -1, -1).contiguous() for t in (rotary.cos_BSh, rotary.sin_BSh))
        return tuple(_CpuRope.apply(x, cos_BSh, sin_BSh) for x in (q_BSHd, k_BSKd))  # type: ignore[no-untyped-call]
    return _rope_torch(q_BSHd, rotary), _rope_torch(k_BSKd, rotary)


def _triton_rope(q_BSHd: Tensor, k_BSKd: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    # The kernel looks each token up in a table by position: here the table has one row per token, in order, or one
    # sequence's rows that all sequences share.
    cos_Th, sin_Th, rows_BS = rotary.tables or _tables(rotary.cos_BSh, rotary.sin_BSh)
    if rows_BS.shape[0] != q_BSHd.shape[0]:
        rows_BS = rows_BS.expand(q_BSHd.shape[0], -1)
    return _triton().rope(q_BSHd, k_BSKd, cos_Th, sin_Th, rows_BS)  # type: ignore[no-any-return]


# --- Gated feed-forward ---------------------------------------------------------------------------------------


class _CpuSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        width = gate_up.shape[-1] // 2
        h = gate_up.new_empty(*gate_up.shape[:-1], width)
        cpu.call("lumina_swiglu", gate_up, h, h.numel() // width, width)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        dgate_up, width = torch.empty_like(gate_up), gate_up.shape[-1] // 2
        rows, dh = gate_up.numel() // (2 * width), grads[0].contiguous()
        cpu.call("lumina_swiglu_backward", dh, gate_up, dgate_up, rows, width)
        return dgate_up


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where gate and up are the halves of the last axis (arXiv:2002.05202)."""
    if _use_triton(gate_up):
        return _triton().swiglu(gate_up)  # type: ignore[no-any-return]
    if _use_cpu(gate_up):
        return _CpuSwiGLU.apply(gate_up)  # type: ignore[no-any-return, no-untyped-call]
    gate, up = _wide(gate_up).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


class _GeGLU(torch.autograd.Function):
    """Keeps its argument alone: autograd over the single operations would keep four tensors of float32."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = _wide(gate_up).chunk(2, -1)
        return (torch.nn.functional.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = _wide(gate_up).chunk(2, -1)
        dh = grads[0].to(gate.dtype)
        dgate = torch.ops.aten.gelu_backward(dh * up, gate, approximate="tanh")
        return torch.cat((dgate, dh * torch.nn.functional.gelu(gate, approximate="tanh")), -1).to(gate_up.dtype)


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up with GELU's tanh approximation (arXiv:2002.05202, arXiv:1606.08415)."""
    return _GeGLU.apply(gate_up)  # type: ignore[no-any-return, no-untyped-call]


# --- Cross-entropy --------------------------------------------------------------------------------


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """Return -log softmax(logits)[target] per row (float32, or float64 for float64 logits) and overwrite the logits
    with weight * (softmax - onehot), the gradient of the weighted sum. targets: int64 in [0, V). weights: float32."""
    if _use_triton(logits_NV):
        return _triton().cross_entropy_(logits_NV, targets_N, weights_N)  # type: ignore[no-any-return]
    rows, vocabulary = logits_NV.shape
    if _use_cpu(logits_NV) and logits_NV.is_contiguous():
        losses_N = torch.empty(rows, dtype=torch.float32)
        weights_N, targets_N = weights_N.float().contiguous(), targets_N.contiguous()
        cpu.call("lumina_cross_entropy", logits_NV, targets_N, weights_N, losses_N, rows, vocabulary)
        return losses_N
    wide_NV = _wide(logits_NV)
    lse_N = wide_NV.logsumexp(-1)
    losses_N = lse_N - wide_NV.gather(1, targets_N[:, None])[:, 0]
    gradient_NV = (wide_NV - lse_N[:, None]).exp_()
    gradient_NV[torch.arange(rows, device=logits_NV.device), targets_N] -= 1.0
    logits_NV.copy_(gradient_NV.mul_(weights_N[:, None].to(wide_NV.dtype)))
    return losses_N
