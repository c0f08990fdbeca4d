"""The optimizer of ZeRO stage 0 in bf16 and fp16: AdamW on float32 master weights, in a few launches a step.

It stands in for DeepSpeed's FP16_UnfusedOptimizer, which divides the gradients by a loss scale that DeepSpeed's engine
multiplies the loss by under ZeRO alone (fp16 gradient norms came out 65,536 times too small), and works tensor by
tensor: 56 bytes moved a parameter and update, where these take 46 (benchmarks/optimizer_traffic.py).

Nothing here waits for the device: the norm, whether the update is made, and fp16's loss scale are tensors on it.
Legend: every list of tensors has one entry a parameter, or a part of one, in the order of the optimizer's groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lumina.config import UserError
from lumina.train.torch_private import foreach_copy, foreach_norm, fused_adamw

_BUCKET = 64 * 2**20  # elements whose gradients exist in float32 at one time: 256 MiB, whatever the model's size


def scale_exhausted(where: str = "") -> UserError:
    """What ends an fp16 run whose gradients are not finite at the smallest loss scale."""
    return UserError(
        f"{where}fp16's loss scale is at its smallest and the gradients are still not finite",
        "Train in bf16 or fp32 (precision), lower learning_rate, or go on from an earlier checkpoint (--resume PATH).",
    )


class LossScale:
    """fp16's loss scale, kept on the device. Grows and shrinks as DeepSpeed's DynamicLossScaler does under ZeRO 1 to 3
    (deepspeed.runtime.fp16.loss_scaler), so that a run sees the same scales under every stage: halved at an overflow
    once `hysteresis` of them have been seen, doubled after `scale_window` steps without one. 0: constant."""

    NAMES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # as DeepSpeed's scaler calls them

    def __init__(
        self,
        scale: float,
        device: torch.device,
        *,
        scale_window: int = 0,
        hysteresis: int = 1,
        refill: bool = False,
        least: float = 1.0,
    ) -> None:
        self._window, self._hysteresis, self._refill, self._least = scale_window, hysteresis, refill, least
        self._state = torch.tensor([scale, 0.0, -1.0, hysteresis], dtype=torch.float64, device=device)
        self.exhausted = torch.zeros((), dtype=torch.bool, device=device)
        """Whether the last step overflowed where the scale cannot shrink: DeepSpeed's scaler raises there."""

    @property
    def scale(self) -> Tensor:
        """By what the loss is multiplied: float32, 0-dimensional, on the device."""
        return self._state[0].float()

    def update(self, overflow: Tensor, refused: Tensor) -> None:
        """After a step: `overflow` says that its gradients were not finite, `refused` (bool, 0-dimensional) that the
        update was not made; one refused for another reason leaves the scale as it was."""
        if not self._window:
            return
        scale, step, last, left = self._state.unbind()
        spent = left <= 1
        self.exhausted = overflow & spent & (scale <= self._least)
        shrunk = torch.where(spent, (scale / 2).clamp(min=self._least), scale)
        stable = step - last - 1
        due = (stable > 0) & (stable % self._window == 0)
        full = torch.full_like(left, self._hysteresis)
        bad = torch.stack((shrunk, step + 1, step, torch.where(spent, left, left - 1)))
        good = torch.stack(
            (torch.where(due, scale * 2, scale), step + 1, last, full if self._refill else torch.where(due, full, left))
        )
        self._state.copy_(torch.where(overflow, bad, torch.where(refused, self._state, good)))

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps. Waits for the device."""
        scale, *counts = self._state.tolist()
        return {self.NAMES[0]: scale, **{name: int(value) for name, value in zip(self.NAMES[1:], counts, strict=True)}}

    def load(self, state: dict[str, float]) -> None:
        """A state saved under any ZeRO stage, by this class or by DeepSpeed's scalers; what it lacks stays."""
        if self._window:
            values = [state.get(name, old) for name, old in self.state().items()]
            self._state.copy_(torch.tensor(values, dtype=torch.float64))


@dataclass
class _Bucket:
    """Parts of one group's tensors, flat, that are updated together."""

    settings: dict[str, Any]  # the optimizer's group: rates, decay
    parameters: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    owners: list[Tensor] = field(default_factory=list)
    spans: list[slice] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(master.numel() for master in self.masters)


class HalfPrecisionAdamW:
    """AdamW over float32 copies of half-precision weights, with clipping and refusal decided on the device.

    Args:
        optimizer: torch's AdamW. Its groups then hold the masters (float32), its state their moments; a step is taken
            here. `step` is one tensor that all masters share.
        clip: the gradient norm above which gradients are scaled down to it; 0 never.
        loss_scale: fp16's; None in bf16.

    Before `step`, `limit` may be set: a number, or a 0-dimensional tensor on the device. After it, `norm` (float32) is
    the global gradient norm before clipping and `applied` (bool) whether the update was made: it was not when the norm
    is above the limit or not finite. Weights, moments and step count are then as before.
    """

    def __init__(self, optimizer: torch.optim.AdamW, clip: float = 0.0, loss_scale: LossScale | None = None) -> None:
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        self.limit: float | Tensor = math.inf
        self.overflow = False  # DeepSpeed's engine asks, and must not wait for the device: see `applied`
        self.updating = False  # whether the update has changed anything since `step` was called
        self._clip = clip
        self.weight_groups: list[list[Tensor]] = []
        self.master_groups: list[list[Tensor]] = []
        for group in optimizer.param_groups:
            self.weight_groups.append(list(group["params"]))
            self.master_groups.append([p.detach().clone().float() for p in group["params"]])
            group["params"] = self.master_groups[-1]
        device = self.master_groups[0][0].device
        self.norm = torch.zeros((), device=device)
        self.applied = torch.ones((), dtype=torch.bool, device=device)
        self.load_step(0)
        self._buckets = list(self._divide())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def load_step(self, step: int) -> None:
        """Set the count of updates made, and create the moments that are missing, as zeros."""
        self._step = torch.tensor(float(step), device=self.norm.device)
        for masters in self.master_groups:
            for master in masters:
                state = self.optimizer.state[master]
                for key in ("exp_avg", "exp_avg_sq"):
                    if key not in state:
                        state[key] = torch.zeros_like(master)
                state["step"] = self._step

    def _divide(self) -> Iterator[_Bucket]:
        for settings, weights, masters in zip(self.param_groups, self.weight_groups, self.master_groups, strict=True):
            bucket = _Bucket(settings)
            for parameter, master in zip(weights, masters, strict=True):
                flat, low = parameter.detach().view(-1), 0
                while low < len(flat):
                    span = slice(low, min(len(flat), low + _BUCKET - bucket.size))
                    bucket.parameters.append(parameter)
                    bucket.owners.append(master)
                    bucket.weights.append(flat[span])
                    bucket.masters.append(master.view(-1)[span])
                    bucket.spans.append(span)
                    low = span.stop
                    if bucket.size == _BUCKET:
                        yield bucket
                        bucket = _Bucket(settings)
            if bucket.masters:
                yield bucket

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.weight_groups:
            for parameter in group:
                parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.updating = False
        scaled = self._scaled_norm()
        scale = self.loss_scale.scale if self.loss_scale is not None else None
        self.norm = scaled if scale is None else scaled / scale
        finite = torch.isfinite(self.norm)
        self.applied = finite & (self.norm <= self.limit)
        skip = (~self.applied).float()
        divisor = scale
        if self._clip:
            excess = ((self.norm + 1e-6) / self._clip).clamp(min=1.0)
            divisor = excess if scale is None else excess * scale
        space = torch.empty(max(b.size for b in self._buckets), dtype=torch.float32, device=skip.device)
        self.updating = True  # from here on nothing large is allocated
        self._step += self.applied
        for bucket in self._buckets:
            self._update(bucket, space, divisor, skip)
        if self.loss_scale is not None:
            self.loss_scale.update(~finite, ~self.applied)
        self.zero_grad()
        self.updating = False

    def _scaled_norm(self) -> Tensor:
        """The global norm of the gradients as they are, loss scale included."""
        grads = [p.grad for group in self.weight_groups for p in group if p.grad is not None]
        if not grads:
            return torch.zeros_like(self.norm)
        return torch.linalg.vector_norm(torch.stack(foreach_norm(grads, 2, dtype=torch.float32)))  # type: ignore[no-any-return]

    def _update(self, bucket: _Bucket, space: Tensor, divisor: Tensor | None, skip: Tensor) -> None:
        """torch's fused AdamW takes gradients of the weights' own type alone: float32, in `space` for one bucket."""
        parts = list(torch.split(space[: bucket.size], [len(master) for master in bucket.masters]))
        halves = [
            torch.zeros_like(weight) if p.grad is None else p.grad.reshape(-1)[span]
            for p, weight, span in zip(bucket.parameters, bucket.weights, bucket.spans, strict=True)
        ]
        foreach_copy(parts, halves)
        firsts, seconds = (
            [
                self.optimizer.state[owner][key].view(-1)[span]
                for owner, span in zip(bucket.owners, bucket.spans, strict=True)
            ]
            for key in ("exp_avg", "exp_avg_sq")
        )
        group = bucket.settings
        beta1, beta2 = group["betas"]
        fused_adamw(
            bucket.masters,
            parts,
            firsts,
            seconds,
            [],
            [self._step] * len(parts),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
            found_inf=skip,
        )
        foreach_copy(bucket.weights, bucket.masters)

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Make the half-precision weights follow the masters."""
        for weights, masters in zip(self.weight_groups, self.master_groups, strict=True):
            foreach_copy(weights, masters)


@contextmanager
def installed() -> Iterator[None]:
    """A DeepSpeed engine made within this takes HalfPrecisionAdamW where it would take its own wrapper of stage 0."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = DeepSpeedEngine._configure_fp16_optimizer
    DeepSpeedEngine._configure_fp16_optimizer = _make
    try:
        yield
    finally:
        DeepSpeedEngine._configure_fp16_optimizer = original


def _make(engine: Any, optimizer: torch.optim.AdamW, low_precision_dtype: torch.dtype) -> HalfPrecisionAdamW:
    scale = None
    if low_precision_dtype is torch.float16:
        options = engine.dynamic_loss_scale_args() if engine.dynamic_loss_scale() else None
        if options is None:
            scale = LossScale(float(engine.loss_scale()), engine.device)
        else:
            scale = LossScale(
                float(options["init_scale"]),
                engine.device,
                scale_window=int(options["scale_window"]),
                hysteresis=int(options["delayed_shift"]),
                refill=bool(options["consecutive_hysteresis"]),
                least=float(options["min_scale"]),
            )
    return HalfPrecisionAdamW(optimizer, float(engine.gradient_clipping()), scale)
