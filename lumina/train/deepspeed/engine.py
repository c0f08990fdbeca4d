"""The DeepSpeed engine: forward, backward, and one optimizer step with its gradient norm.

What DeepSpeed does differently from stage to stage is evened out here, so that the loop sees one engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lumina.config import Config
from lumina.model import Transformer
from lumina.train.deepspeed import half_precision
from lumina.train.deepspeed.gradient_gate import GradientGate, refusal
from lumina.train.deepspeed.half_precision import HalfPrecisionAdamW
from lumina.train.deepspeed.optimizer import build_optimizer
from lumina.train.deepspeed.release import clear_failed_backward_passes, oldest_node, release
from lumina.train.deepspeed.surface import Wrapper
from lumina.train.deepspeed.timing import StepTimer
from lumina.train.objectives import objective
from lumina.train.torch_private import AdamW

if TYPE_CHECKING:
    from lumina.data import TorchBatch


class Engine:
    """A DeepSpeed engine with the gradient clipped, its norm known and a bad step skipped under every stage."""

    def __init__(self, model: Transformer, config: Config, ds_config: dict[str, Any]) -> None:
        import deepspeed
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

        if AdamW not in ZERO_SUPPORTED_OPTIMIZERS:  # by type, which a subclass is not
            ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)
        self._oldest_node = oldest_node()  # than any pass
        self.stage = int(ds_config.get("zero_optimization", {}).get("stage", 0))
        self.half = any(ds_config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
        self.fp16 = bool(ds_config.get("fp16", {}).get("enabled"))
        self._objective = objective(config)
        self._clip = 0.0
        if self.stage == 0 and not self.half:
            # DeepSpeed clips here without reporting the norm or refusing a NaN: done below instead.
            self._clip = float(ds_config.get("gradient_clipping", 0.0))
            ds_config = {**ds_config, "gradient_clipping": 0.0}
        optimizer = build_optimizer(model, config, ds_config)
        allowed: dict[str, Any] = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        allowed["timers"] = {"throughput": {"enabled": False}}  # it waits for the device at each micro-batch
        if self.stage == 3 and (model.tile_tokens or model.head_groups > 1):
            # Else DeepSpeed would gather weights around each module's call, tile by tile, and in another order on each
            # rank: a layer's weights are gathered together, around the layer.
            deepspeed.utils.set_z3_leaf_modules(model, [type(model.blocks[0])])
        with half_precision.installed():
            self.ds, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={**allowed, **ds_config})
        self.wrapped: Any = self.ds.optimizer
        self.wrapper = Wrapper.of(self.wrapped)
        self._own: HalfPrecisionAdamW | None = self.wrapped if self.wrapper is Wrapper.HALF else None
        self.device: torch.device = self.ds.device
        self.timer = StepTimer(self.device)
        self.timer.watch_collectives()
        if model.sequence is not None:
            model.sequence.exchanging = self.timer.exchanging
        self.collectives = False  # whether a collective may have been begun since the loop last set this
        self._accumulated = False  # whether there are gradients that no step has used
        self._stepping = False  # whether the optimizer proper has been called in this step
        self.optimizer.step = self._noted(self.optimizer.step)  # type: ignore[method-assign]
        self._gate = GradientGate(self.wrapper, self.wrapped, self.optimizer, self.device, self.fp16)
        if self.stage == 0 and torch.distributed.get_world_size() == 1:
            # Alone there is nothing to reduce, but DeepSpeed would flatten all gradients and copy them back.
            self.ds.enable_backward_allreduce = False

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer proper, inside DeepSpeed's wrapper (`wrapped`, of the kind `wrapper`)."""
        return self.ds.basic_optimizer  # type: ignore[no-any-return]

    @property
    def model(self) -> Transformer:
        return self.ds.module  # type: ignore[no-any-return]

    def close(self) -> None:
        """Give up what it holds, before another engine of the same process takes its place."""
        self.timer.close()
        clear_failed_backward_passes(self._oldest_node)
        self.ds.destroy()
        if self.stage == 3:
            release(self.model)

    def _noted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self._stepping = True
            return step(*args, **kwargs)

        return noted

    @property
    def begun(self) -> bool:
        """After a step that failed: whether weights or moments may have changed on this rank."""
        return self._stepping or (self._own is not None and self._own.updating)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def loss(self, batch: TorchBatch, scale: float = 1.0, by_position: torch.Tensor | None = None) -> torch.Tensor:
        """scale * sum(weight * loss) of a micro-batch by the run's objective, in nats, followed by the sums of its
        figures: (1 + F). by_position: (2, K) float64, to which an evaluation adds what lumina.model.loss_by_position
        knows of tokens that the objective weights one by one."""

        def forward(batch: TorchBatch, weights_N: torch.Tensor | None, **options: Any) -> torch.Tensor:
            if by_position is None or weights_N is None or options:
                return self.forward(batch, weights_N, **options)
            sums = self.forward(batch, weights_N, by_position=True)
            by_position.add_(sums[1:].view_as(by_position))
            return sums[0]

        return self._objective.loss(forward, batch.to(self.device), scale).reshape(-1)

    @property
    def collective_forward(self) -> bool:
        """Whether ranks meet in the forward pass: ZeRO-3 gathers weights there, and attention is exchanged where ranks
        share rows."""
        return self.stage == 3 or self.model.sequence is not None

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of what the run's objective tells beside its loss."""
        return self._objective.figures

    def logits(self, ids_BS: torch.Tensor, positions_BS: torch.Tensor, **options: Any) -> torch.Tensor:
        """The model's output for these tokens; collective under ZeRO-3. `options`: what else its forward takes."""
        out: torch.Tensor = self.ds(ids_BS, positions_BS, **options)
        return out

    def forward(self, batch: TorchBatch, weights_N: torch.Tensor | None, **options: Any) -> torch.Tensor:
        """The model's forward pass, as lumina.train.objectives.Forward says."""
        out: torch.Tensor = self.ds(
            batch.ids_T[None],
            batch.positions_T[None],
            batch.cu_seqlens_D,
            batch.max_seqlen,
            batch.targets_N,
            weights_N,
            supervised_N=batch.supervised_N,
            bounds=batch.bounds,
            **options,
        )
        return out

    def take_routing_counts(self) -> torch.Tensor | None:
        """What this rank's micro-batches since the last call add to the step's lumina.model.expert_balance: float64,
        on the device; None where no layer has experts."""
        return self.model.take_routing_counts()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """The model in evaluation mode in the `with` block, then in training mode again."""
        self.ds.eval()
        try:
            yield
        finally:
            self.ds.train()

    def accumulate(self, batch: TorchBatch, scale: float, last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns what `loss` does, detached.

        On the last micro-batch of a step the gradients are reduced over the ranks. That boundary is set by hand,
        because an epoch's last step may have fewer micro-batches than the others; and DeepSpeed must not divide by the
        accumulation steps, because `scale` already divides by the step's true token count.
        """
        self._accumulated = True
        self.ds.set_gradient_accumulation_boundary(is_boundary=last)
        # float16 gradients would underflow divided by a token count that the loss scale has not met yet: there the
        # division comes after the loss.
        inner, outer = (1.0, scale) if self.fp16 else (scale, 1.0)
        self.collectives = self.collectives or self.collective_forward
        with self.timer.phase("forward"), self._gate.without_waiting():
            sums = self.loss(batch, inner)
        # Multiplied even by one: DeepSpeed 0.19.8 divides the gradient of a tensor that its forward returned by the
        # accumulation steps, scale_wrt_gas or not, unless backward() is called on a tensor derived from it (stage 0).
        sums = sums * outer
        loss = sums[0]
        # fp16's loss scale comes from DeepSpeed's backward() under ZeRO alone.
        scaled = loss * self._own.loss_scale.scale if self._own is not None and self._own.loss_scale else loss
        self.collectives = self.collectives or self.stage == 2 or last
        with self.timer.phase("backward"), self._gate.without_waiting():
            self.ds.backward(scaled, scale_wrt_gas=False)
        return sums.detach()

    def step(self, limit: float | torch.Tensor = math.inf) -> tuple[torch.Tensor, torch.Tensor]:
        """Update the weights. Returns the gradient norm before clipping and whether the step was applied (bool): a norm
        that is above `limit` or not finite leaves the weights as they are, on every rank alike. Both are 0-dimensional
        tensors on the device, as `limit` may be, and nothing here waits for it: gradient_gate.py says where it does.
        Raises UserError where fp16's loss scale is at its smallest and overflows under stages 1 to 3; see `exhausted`.
        """
        self._accumulated = self._stepping = False
        scaler = vars(self._scaler()) if self.fp16 and self._own is None else {}
        before = dict(scaler)
        try:
            return self._step(limit)
        except torch.OutOfMemoryError:
            scaler.update(before)  # the step will be taken again
            raise

    def exhausted(self) -> torch.Tensor | None:
        """Whether the last step overflowed at fp16's smallest loss scale (bool, on the device), where `step` does not
        raise for it: under stage 0, whose scale the host does not know."""
        return self._own.loss_scale.exhausted if self._own is not None and self._own.loss_scale is not None else None

    def _step(self, limit: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._own is not None:
            self._own.limit = limit
            self.ds.step()
            return self._own.norm, self._own.applied
        if self.wrapper is not Wrapper.NONE:
            norm, refused = self._gate.step(self.ds.step, limit)
            return norm, ~refused
        # In float64: torch's float32 norm of the embedding's 25 million gradients is off in the fifth digit.
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]))
        refused = refusal(norm, limit)
        if self._clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self._clip, norm)
        self.optimizer.found_inf = refused.float()  # type: ignore[attr-defined]
        self.ds.step()
        return norm, ~refused

    def discard(self) -> None:
        """Give up the gradients of the step that was begun, if there are any; collective."""
        if self._accumulated:
            self.step(-1.0)

    def loss_scale(self) -> dict[str, float]:
        """The state of fp16's dynamic loss scale, empty otherwise."""
        if self._own is not None:
            return self._own.loss_scale.state() if self._own.loss_scale is not None else {}
        return {k: v for k, v in vars(self._scaler()).items() if isinstance(v, int | float)} if self.fp16 else {}

    def gradient_scale(self) -> float | torch.Tensor:
        """By what the gradients between backward and update are too large: fp16's loss scale, 1 elsewhere."""
        if self._own is not None and self._own.loss_scale is not None:
            return self._own.loss_scale.scale
        return float(self._scaler().cur_scale) if self.fp16 else 1.0

    def set_loss_scale(self, state: dict[str, float]) -> None:
        if self._own is not None and self._own.loss_scale is not None:
            self._own.loss_scale.load(state)
        elif self.fp16:
            vars(self._scaler()).update(state)

    def _scaler(self) -> Any:
        return self.wrapped.loss_scaler
