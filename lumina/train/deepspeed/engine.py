"""The DeepSpeed engine: process group, initialisation, and one optimizer step with its gradient norm.

What DeepSpeed does differently from stage to stage is evened out here, so that the loop sees one engine.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lumina.cluster import bind, detect_launcher, end_with_parent, parent_signal
from lumina.config import Config, UserError, explain_duplicate, take_device, usable_cpus
from lumina.model import Transformer
from lumina.train.deepspeed import half_precision
from lumina.train.deepspeed.gradient_gate import GradientGate, refusal
from lumina.train.deepspeed.optimizer import build_optimizer
from lumina.train.deepspeed.release import clear_failed_backward_passes, oldest_node, release
from lumina.train.deepspeed.timing import StepTimer
from lumina.train.objectives import objective
from lumina.train.torch_private import AdamW

if TYPE_CHECKING:
    from lumina.data import TorchBatch


log = logging.getLogger("lumina")
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @property
    def main(self) -> bool:
        return self.rank == 0


def join() -> Ranks:
    """Join the process group that the launcher described, or be a world of one. Sets the threads of this rank."""
    launcher = detect_launcher()
    rank, world, local, local_world = (int(os.environ[name]) for name in _NAMES)
    if launcher is not None and world > 1:
        end_with_parent(parent_signal())
    if os.environ.get("LUMINA_BIND") == "1":
        cpus, threads = bind(local, local_world)
    else:
        cpus, threads = [], max(1, len(usable_cpus()) // local_world)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    if cpus:
        log.info("rank %d on %s: CPUs %s, %d thread(s)", rank, socket.gethostname(), cpus, torch.get_num_threads())
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices:
        torch.cuda.set_device(take_device(local, local_world, devices))
    _hush()
    deepspeed = import_deepspeed()

    if not torch.distributed.is_initialized():
        backend = importlib.import_module("deepspeed.comm.torch")  # `deepspeed.comm.torch` is torch itself
        # Its all-reduce through shared memory is for tensor-parallel inference alone. Made at every start, it would
        # cost a compilation on a new machine and 66 MB a rank, in a segment that a killed rank leaves to the next run
        # on the same port.
        vars(backend)["build_shm_op"] = lambda: None
        try:
            deepspeed.init_distributed(verbose=False)
        except RuntimeError as error:
            raise explain_duplicate(error, devices, local_world) or error from None
    return Ranks(rank, world, local, local_world)


def import_deepspeed() -> Any:
    """DeepSpeed, without two things that it loads at every start for nobody: mlflow, which its autotuner imports
    wherever there is one (three seconds), and torch's compiler, for functions of the Muon optimizer (four a rank)."""
    if not torch.cuda.is_available():
        # A CUDA build without a driver, too: unset, DeepSpeed looks for every kind of accelerator and warns.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    hide, compile_ = "mlflow" not in sys.modules, torch.compile
    if hide:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # so Python marks what cannot be imported
    torch.compile = lambda model=None, **_: model
    try:
        import deepspeed
        import deepspeed.runtime.zero.muon.muon_optimizer
    finally:
        torch.compile = compile_
        if hide:
            del sys.modules["mlflow"]
    return deepspeed


def _quiet() -> bool:
    return os.environ.get("LUMINA_DEBUG") != "1"


def _hush() -> None:
    """DeepSpeed logs dozens of lines on start; Lumina says what matters itself. LUMINA_DEBUG=1 keeps them."""
    if not _quiet():
        return
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import_deepspeed().utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\..*")
    warnings.filterwarnings("ignore", message=".*barrier.*device.*")


def leave() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def end_process(code: int) -> int:
    """With several ranks, end the process here and now with `code`; alone, return it.

    gloo's threads outlive destroy_process_group while DeepSpeed holds its groups. One that drops its last tensor while
    the interpreter is being torn down is killed inside a destructor, and the process aborts: one in six of the shortest
    two-rank runs reported -6 after finishing well (torch 2.13, Python 3.11).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def scale_exhausted(where: str = "") -> UserError:
    """What ends an fp16 run whose gradients are not finite at the smallest loss scale."""
    return UserError(
        f"{where}fp16's loss scale is at its smallest and the gradients are still not finite",
        "Train in bf16 or fp32 (precision), lower learning_rate, or go on from an earlier checkpoint (--resume PATH).",
    )


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
        with half_precision.installed():
            self.ds, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={**allowed, **ds_config})
        wrapper = self.ds.optimizer
        self._own = wrapper if isinstance(wrapper, half_precision.HalfPrecisionAdamW) else None
        self.device: torch.device = self.ds.device
        self.timer = StepTimer(self.device)
        self.timer.watch_collectives()
        self.collectives = False  # whether a collective may have been begun since the loop last set this
        self._accumulated = False  # whether there are gradients that no step has used
        self._stepping = False  # whether the optimizer proper has been called in this step
        self.optimizer.step = self._noted(self.optimizer.step)  # type: ignore[method-assign]
        self._gate = GradientGate(self.ds.optimizer, self.optimizer, self.device, self.fp16)
        if self.stage == 0 and torch.distributed.get_world_size() == 1:
            # Alone there is nothing to reduce, but DeepSpeed would flatten all gradients and copy them back.
            self.ds.enable_backward_allreduce = False

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer proper, inside DeepSpeed's wrapper."""
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

    def loss(self, batch: TorchBatch, scale: float = 1.0) -> torch.Tensor:
        """scale * sum(weight * loss) of a micro-batch by the run's objective, in nats."""
        return self._objective.loss(self.forward, batch.to(self.device), scale)

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

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """The model in evaluation mode in the `with` block, then in training mode again."""
        self.ds.eval()
        try:
            yield
        finally:
            self.ds.train()

    def accumulate(self, batch: TorchBatch, scale: float, last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its loss, scale * sum(weight * token loss), detached.

        On the last micro-batch of a step the gradients are reduced over the ranks. That boundary is set by hand,
        because an epoch's last step may have fewer micro-batches than the others; and DeepSpeed must not divide by the
        accumulation steps, because `scale` already divides by the step's true token count.
        """
        self._accumulated = True
        self.ds.set_gradient_accumulation_boundary(is_boundary=last)
        # float16 gradients would underflow divided by a token count that the loss scale has not met yet: there the
        # division comes after the loss.
        inner, outer = (1.0, scale) if self.fp16 else (scale, 1.0)
        self.collectives = self.collectives or self.stage == 3
        with self.timer.phase("forward"), self._gate.without_waiting():
            loss = self.loss(batch, inner)
        # Multiplied even by one: DeepSpeed 0.19.8 divides the gradient of a tensor that its forward returned by the
        # accumulation steps, scale_wrt_gas or not, unless backward() is called on a tensor derived from it (stage 0).
        loss = loss * outer
        # fp16's loss scale comes from DeepSpeed's backward() under ZeRO alone.
        scaled = loss * self._own.loss_scale.scale if self._own is not None and self._own.loss_scale else loss
        self.collectives = self.collectives or self.stage == 2 or last
        with self.timer.phase("backward"), self._gate.without_waiting():
            self.ds.backward(scaled, scale_wrt_gas=False)
        return loss.detach()

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
        except Exception as error:
            if self.fp16 and "loss scale already at minimum" in str(error):  # DeepSpeed's, of no type of its own
                raise scale_exhausted() from None
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
        if self.stage != 0 or self.half:
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
        return self.ds.optimizer.loss_scaler
