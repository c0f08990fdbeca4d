"""Refusing an update because of its gradient norm, inside DeepSpeed's own step.

DeepSpeed computes the global norm, and skips the update when that is not finite, in one call; there is no place in
between to say no. Here the norm that its step sees is made infinite when it is above a limit, so that a refused update
takes the very path of a NaN: gradients freed, buffers reset, nothing applied, on every rank alike because the norm is
the same number on every rank. The true norm is kept for the record.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


class Veto:
    """Installed once on an engine's ZeRO wrapper. `norm` is the last step's true global norm, None
    where the wrapper found an overflow first or computes no norm that can be watched."""

    def __init__(self, wrapper: Any) -> None:
        self.limit = math.inf
        self.norm: float | None = None
        self._wrapper = wrapper
        self._scaler: Any = getattr(wrapper, "loss_scaler", None)
        self._flat = hasattr(wrapper, "fp32_groups_flat_partition")
        if hasattr(wrapper, "_get_norm_groups"):  # stage 3
            wrapper._get_norm_groups = self._watch(wrapper._get_norm_groups, _combined, many=True)
        elif hasattr(wrapper, "scaled_global_norm"):  # stages 1 and 2
            wrapper.scaled_global_norm = self._watch(wrapper.scaled_global_norm, float, many=False)

    def _watch(self, norm_of: Callable[[], Any], read: Callable[[Any], float], many: bool) -> Callable[[], Any]:
        def watched() -> Any:
            found = norm_of()
            self.norm = read(found) / self._scale()
            if not self.norm > self.limit:
                return found
            infinite = torch.as_tensor(math.inf)
            return [infinite] if many else infinite

        return watched

    def _scale(self) -> float:
        return float(getattr(self._scaler, "cur_scale", 1.0)) if self._scaler is not None else 1.0

    def step(self, step: Callable[[], None], limit: float) -> None:
        """Run DeepSpeed's `step` under a limit. A refusal leaves fp16's loss scale as it was: nothing overflowed."""
        self.limit, self.norm = limit, None
        if self._flat and self._refuses_flat():
            return
        before = dict(vars(self._scaler)) if self._scaler is not None else {}
        step()
        if self._scaler is not None and limit < (self.norm or 0.0) < math.inf:
            vars(self._scaler).update(before)

    def _refuses_flat(self) -> bool:
        """Stage 1 with float32 accumulation (BF16_Optimizer) asks a function that cannot be watched: ask it first."""
        from deepspeed.runtime.utils import get_global_norm_of_tensors

        if not math.isfinite(self.limit):
            return False
        grads, _ = self._wrapper.get_grads_for_norm()
        self.norm = float(get_global_norm_of_tensors(input_tensors=grads, mpu=self._wrapper.mpu))
        if not self.limit < self.norm < math.inf:
            return False
        self._wrapper.clear_hp_grads()
        self._wrapper.clear_lp_grads()
        self._wrapper.overflow = True
        return True


def _combined(groups: list[Any]) -> float:
    from deepspeed.runtime.utils import combine_grad_norm_groups

    return float(combine_grad_norm_groups(groups))
