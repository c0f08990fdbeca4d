"""The gradient-norm gate: an update is refused because of its gradient norm, inside DeepSpeed's own step.

DeepSpeed computes the global norm and asks at several places whether it is finite, each time waiting for the device
(0.19.8: two to six times a step). Here its step goes through with whatever the norm is, without a question, and the
decision is a tensor on the device: torch's fused AdamW leaves weights, moments and step count as they are where
`found_inf` is 1. The decision is the same on every rank, since the norm is.

Two kinds of step need the decision on the host, and wait for the device once: fp16, whose dynamic loss scale DeepSpeed
keeps there, and an optimizer on the host (offload_optimizer). There a refused step takes DeepSpeed's own path of an
overflow.

DeepSpeed has its streams put in order by making the host wait for all of them (0.19.8: at each micro-batch under stages
2 and 3, and at each bucket under stage 2 with overlap_comm). Here they wait for each other on the device: what was
queued on any of them comes before what is queued on any of them later, which is all that the device sees of a host's
wait. Offloaded state is read by the host itself, which does have to wait: nothing of this there. The waits are counted
in tests/train/test_host_waits.py; on a card the order of the streams has not been tried.

History of overlap_comm under stages 1 and 2, read before it became the default (DeepSpeed's issues): a bucket was
refilled while it was being reduced (7188, 7804; fixed by not resetting the index of the pair of buckets), copies from
several autograd streams were not waited for (8061), stage 3 waited for the wrong stream (pull request 7898). The fixes
are in 0.19.8. A gradient larger than the bucket is still reduced where it lies, and freed under stage 2 without a word
to the allocator: the bucket is therefore never smaller than the largest tensor (lumina.config.deepspeed).

half_precision and timing replace others of DeepSpeed's private functions; surface lists all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumina.train.deepspeed.half_precision import scale_exhausted
from lumina.train.deepspeed.surface import Wrapper
from lumina.train.torch_private import foreach_multiply


def refusal(norm: Tensor, limit: float | Tensor) -> Tensor:
    """Whether an update of this gradient norm is refused: bool, 0-dimensional, on the norm's device."""
    return ~(torch.isfinite(norm) & (norm <= limit))


class GradientGate:
    """Installed once on an engine's wrapper (`wrapped`, of the kind `wrapper`); `optimizer` is the one inside it,
    `device` the one that computes. Of a wrapper that is ours, or none, it does nothing but order streams."""

    def __init__(
        self, wrapper: Wrapper, wrapped: Any, optimizer: torch.optim.Optimizer, device: torch.device, fp16: bool
    ) -> None:
        self._wrapper, self._wrapped, self._optimizer, self._device = wrapper, wrapped, optimizer, device
        self._on_host = fp16 or not isinstance(optimizer, torch.optim.AdamW)
        self._skip = False  # whether this step's update is refused, where the host is asked
        self._limit: float | Tensor = math.inf
        self._norm = self._refused = torch.zeros((), device=device)
        # Functions that DeepSpeed's step finds in its own module.
        self._module: Any = None
        self._replaced: dict[str, Callable[..., Any]] = {}
        match wrapper:
            case Wrapper.ZERO_3:
                self._watch_zero3()
            case Wrapper.ZERO_1_2:
                self._watch_zero_1_2()
            case Wrapper.BF16:
                self._watch_bf16()
            case Wrapper.HALF | Wrapper.NONE:
                pass  # one decides itself, the other's step is not DeepSpeed's
        self._order = _StreamOrder(wrapper, wrapped)

    def step(self, step: Callable[[], None], limit: float | Tensor) -> tuple[Tensor, Tensor]:
        """Run DeepSpeed's `step` under a limit, a number or a 0-dimensional tensor on the device. Returns the global
        norm before clipping and whether the update was refused, both 0-dimensional, on the device. A refusal leaves
        fp16's loss scale as it was where the norm is finite: nothing overflowed."""
        self._limit, self._skip = limit, False
        # What holds when the JSON says that no norm is computed (zero_optimization.compute_grad_norm).
        self._norm = torch.full((), math.nan, device=self._device)
        self._refuse(refusal(torch.zeros((), device=self._device), limit))
        with self.without_waiting(), _replaced(self._module, self._replaced):
            step()
        self._order.join()  # the next forward pass gathers weights on a stream of its own
        self._optimizer.found_inf = None  # type: ignore[attr-defined]
        return self._norm, self._refused

    def without_waiting(self) -> AbstractContextManager[None]:
        """Within it DeepSpeed orders its streams on the device where it would make the host wait."""
        return self._order.in_place()

    def _watch_zero3(self) -> None:
        """Stage 3: the norms of groups stay on the device, and where they meet it is decided."""
        from deepspeed.runtime.zero import stage3

        self._watch_zero(stage3)
        norms = self._wrapped._get_norm_groups
        self._wrapped._get_norm_groups = lambda: [self._decide(_norm(norms()))]

    def _watch_zero_1_2(self) -> None:
        """Stages 1 and 2: the same. Where the JSON says that no norm is computed (zero_optimization.compute_grad_norm)
        DeepSpeed's own search for gradients that are not finite stays: elsewhere one makes a norm that is not."""
        from deepspeed.runtime.zero import stage_1_and_2

        self._watch_zero(stage_1_and_2, self._wrapped.compute_grad_norm)
        if self._wrapped.compute_grad_norm:
            self._wrapped.check_grad_overflow = True  # or the norm of a bf16 gradient would not be asked about
        norm = self._wrapped.scaled_global_norm
        self._wrapped.scaled_global_norm = lambda norm_type=2: self._decide(norm(norm_type))

    def _watch_zero(self, module: Any, has_norm: bool = True) -> None:
        self._module = module
        self._replaced["is_invalid_grad_norm"] = lambda norm: self._skip
        if has_norm:
            self._wrapped.check_overflow = lambda *_, **__: None
        self._wrapped.get_grad_norm_direct = self._norm_of
        self._wrapped.complete_grad_norm_calculation_for_cpu_offload = self._norm_of_offloaded
        scaler = self._wrapped.loss_scaler
        scaler.update_scale = _exhausted_by_type(scaler.update_scale)

    def _watch_bf16(self) -> None:
        """Stage 1 with float32 accumulation."""
        from deepspeed.runtime import bf16_optimizer

        self._module = bf16_optimizer
        self._replaced["is_invalid_grad_norm"] = lambda norm: self._skip
        self._replaced["get_global_norm_of_tensors"] = lambda input_tensors, **_: self._decide(_norm(input_tensors))
        self._replaced["clip_tensors_by_global_norm"] = _clip

    def _norm_of(self, gradients: list[Tensor], params: list[Any], norm_type: float = 2) -> Tensor:
        """What DeepSpeed's function of this place returns, without the copy of a number to the device in it."""
        return self._over_ranks([g for g in gradients if not getattr(g, "_zero_padding", False)], params)

    def _norm_of_offloaded(self, params: list[Any]) -> Tensor:
        """The same for gradients that have left the device, whose norms were taken before."""
        norms, key = self._wrapped.norm_for_param_grads, self._wrapped.get_param_id
        found = [norms[key(p)] for p in params if key(p) in norms]
        return self._over_ranks([torch.stack(found)] if found else [], params)

    def _over_ranks(self, parts: list[Tensor], params: list[Any]) -> Tensor:
        of_zero_3 = self._wrapper is Wrapper.ZERO_3
        group = self._wrapped._get_param_partition_group(params[0]) if of_zero_3 else self._wrapped.dp_process_group
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        total = _norm(parts).to(self._device).square() if parts else zero
        dist.all_reduce(total, group=group)
        return total.sqrt().float()

    def _decide(self, scaled: Tensor) -> Tensor:
        """Called within DeepSpeed's step, where it has the norm, still multiplied by the loss scale; returns the norm
        that the step goes on with."""
        # BF16_Optimizer has no loss scale, and its device is the engine's.
        bf16 = self._wrapper is Wrapper.BF16
        self._norm = scaled / (1.0 if bf16 else float(self._wrapped.loss_scaler.cur_scale))
        self._refuse(refusal(self._norm, self._limit))
        if not self._on_host:
            return scaled
        norm, refused = torch.stack((scaled.double(), self._refused.double())).tolist()  # the one wait
        self._skip = bool(refused)
        if self._skip and math.isfinite(norm):
            self._keep_scale()
        found = math.inf if self._skip else norm
        return torch.full((), found, dtype=torch.float32, device=self._device if bf16 else self._wrapped.device)

    def _refuse(self, refused: Tensor) -> None:
        self._refused = refused
        self._optimizer.found_inf = refused.float()  # type: ignore[attr-defined]

    def _keep_scale(self) -> None:
        """Have this step leave the loss scale as it is, which it would halve."""
        self._wrapped._update_scale = lambda *_: delattr(self._wrapped, "_update_scale")


class _StreamOrder:
    """The streams of a ZeRO wrapper, and DeepSpeed's accelerator as its modules see it: `synchronize` is `join`."""

    def __init__(self, wrapper: Wrapper, wrapped: Any) -> None:
        from deepspeed.accelerator import get_accelerator

        self._accelerator: Any = get_accelerator()
        self._streams: list[Any] = []
        self._modules: list[Any] = []
        self._gathers = False  # whether weights are put together from the ranks' shards: stage 3
        if self._accelerator.resolves_data_dependency():
            return
        if wrapper is Wrapper.ZERO_1_2 and not wrapped.cpu_offload:
            from deepspeed.runtime.zero import stage_1_and_2

            self._streams, self._modules = [wrapped.reduction_stream], [stage_1_and_2]
        elif wrapper is Wrapper.ZERO_3 and not (wrapped.offload_optimizer or wrapped.offload_param):
            from deepspeed.runtime.zero import partition_parameters

            self._gathers = True
            gathering = wrapped.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
            self._streams, self._modules = [wrapped.reduce_and_partition_stream, gathering], [partition_parameters]
            wrapped.reduce_and_partition_stream.synchronize = self.join

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def synchronize(self, device_index: Any = None) -> None:
        self.join()

    def resolves_data_dependency(self) -> bool:
        """Alone, a rank gathers nothing, and stage 3 would wait for its own shards all the same. Not so under stages 1
        and 2, which ask here whether a stream has to wait for the one that fills its bucket: alone it does too."""
        return self._gathers and dist.get_world_size() == 1

    def join(self) -> None:
        if self._streams:
            current = self._accelerator.current_stream()
            streams = [self._accelerator.default_stream(), *self._streams]
            for stream in streams:
                current.wait_stream(stream)
            for stream in streams:
                stream.wait_stream(current)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the modules find this object where they ask for the accelerator."""
        with ExitStack() as stack:
            for module in self._modules:
                stack.enter_context(_replaced(module, {"get_accelerator": lambda: self}))
            yield


def _exhausted_by_type(update_scale: Callable[..., None]) -> Callable[..., None]:
    """The one exception of DeepSpeed's loss scalers, of no type of its own, means that the scale is exhausted."""

    def update(overflow: bool) -> None:
        try:
            update_scale(overflow)
        except Exception:
            raise scale_exhausted() from None

    return update


@contextmanager
def _replaced(module: Any, functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Within it a module finds these functions under its own names."""
    if not functions:
        yield
        return
    found = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(found)


def _norm(tensors: list[Tensor]) -> Tensor:
    """The norm over several tensors, float64, as DeepSpeed computes it: in float32 the fifth digit is off."""
    norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors])
    return torch.linalg.vector_norm(norms)  # type: ignore[no-any-return]


def _clip(input_tensors: list[Tensor], max_norm: float, global_norm: Tensor, **_: Any) -> None:
    """Scale gradients of this norm down to `max_norm`, where it is above; DeepSpeed's arithmetic."""
    foreach_multiply(input_tensors, (max_norm / (global_norm + 1e-6)).clamp(max=1.0))
