"""The optimizer of stage 0 in half precision: plain AdamW on float32 masters, decided on the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch.utils._python_dispatch import TorchDispatchMode

from lumina.config import UserError
from lumina.train.deepspeed import half_precision, startup
from lumina.train.deepspeed.half_precision import HalfPrecisionAdamW, LossScale
from tests.train.tiny_engines import make_engine, same_state, state_of, train_step

SHAPES = [(7, 5), (40,), (3, 4, 5)]
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6}


class NoWaits(TorchDispatchMode):
    """Reading a tensor's value makes the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero"), func
        return func(*args, **(kwargs or {}))


def weights(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in SHAPES]


def build(dtype: torch.dtype, clip: float, scale: LossScale | None = None) -> HalfPrecisionAdamW:
    first, *rest = weights(dtype)
    groups = [{"params": [first], "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return HalfPrecisionAdamW(torch.optim.AdamW(groups, fused=True, **SETTINGS), clip, scale)


def give_gradients(made: HalfPrecisionAdamW, seed: int, times: float = 1.0) -> list[torch.Tensor]:
    """Random gradients in the weights' own type, `times` too large; returns their float32 values."""
    torch.manual_seed(seed)
    found = []
    for group in made.weight_groups:
        for weight in group:
            weight.grad = (torch.randn(weight.shape) * times).to(weight.dtype)
            found.append(weight.grad.float() / times)
    return found


@pytest.mark.parametrize("bucket", [10**6, 16])
@pytest.mark.parametrize("clip", [0.0, 0.5, 1e3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_is_plain_adamw(
    dtype: torch.dtype, clip: float, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's unfused AdamW on float32 copies; fp16's gradients are 1024 times too large; tensors may be divided."""
    monkeypatch.setattr(half_precision, "_BUCKET", bucket)
    fp16 = dtype is torch.float16
    made = build(dtype, clip, LossScale(1024.0, torch.device("cpu")) if fp16 else None)
    assert len(made._buckets) == (2 if bucket > 100 else 10)
    copies = [w.detach().float().requires_grad_() for w in weights(dtype)]
    groups = [{"params": copies[:1], "weight_decay": 0.1}, {"params": copies[1:], "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, foreach=False, **SETTINGS)
    for seed in range(4):
        for copy, gradient in zip(copies, give_gradients(made, seed, 1024.0 if fp16 else 1.0), strict=True):
            copy.grad = gradient
        with NoWaits():
            made.step()
        norm = torch.nn.utils.clip_grad_norm_(copies, clip or math.inf)
        plain.step()
        assert bool(made.applied)
        assert float(made.norm) == pytest.approx(float(norm), rel=1e-6)
    flat = [
        (w, m) for pair in zip(made.weight_groups, made.master_groups, strict=True) for w, m in zip(*pair, strict=True)
    ]
    for (weight, master), copy in zip(flat, copies, strict=True):
        torch.testing.assert_close(master, copy.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(weight, master.to(dtype))
        assert weight.grad is None


@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_refused_update_changes_nothing(as_tensor: bool) -> None:
    """Above a limit, given as a number or as a tensor on the device, or not finite."""
    made = build(torch.bfloat16, 1.0)
    give_gradients(made, 0)
    made.step()
    masters = [master.clone() for group in made.master_groups for master in group]
    states = [{key: value.clone() for key, value in state.items()} for state in made.state.values()]
    for bad in (1.0, math.nan, math.inf):
        give_gradients(made, 1)
        made.weight_groups[1][0].grad.mul_(bad)  # type: ignore[union-attr]
        made.limit = torch.tensor(1e-3) if as_tensor else 1e-3
        with NoWaits():
            made.step()
        assert not made.applied
        assert all(map(torch.equal, masters, (m for group in made.master_groups for m in group)))
        for before, state in zip(states, made.state.values(), strict=True):
            assert all(torch.equal(before[key], state[key]) for key in before)
    assert int(next(iter(made.state.values()))["step"]) == 1


@pytest.mark.parametrize("refill", [True, False])
@pytest.mark.parametrize("hysteresis", [1, 2])
def test_the_loss_scale_is_deepspeeds(hysteresis: int, refill: bool) -> None:
    """As under ZeRO 1 to 3, over overflows and long enough without them; and its state is exchanged with theirs."""
    startup.init_process_group()  # DeepSpeed's scaler asks for its rank
    cpu, yes, no = torch.device("cpu"), torch.tensor(True), torch.tensor(False)
    ours = LossScale(256.0, cpu, scale_window=5, hysteresis=hysteresis, refill=refill, least=4.0)
    theirs = DynamicLossScaler(256.0, 5, 4.0, hysteresis, refill, raise_error_at_min_scale=False)
    torch.manual_seed(1)
    seen = set()
    for step in range(200):
        overflow = bool(torch.rand(()) < (0.6 if step // 40 % 2 else 0.05))
        ours.update(yes if overflow else no, yes if overflow else no)
        theirs.update_scale(overflow)
        assert ours.state() == {name: vars(theirs)[name] for name in LossScale.NAMES}
        seen.add(float(ours.scale))
        before = ours.state()
        ours.update(no, yes)  # refused for its norm: nothing overflowed
        assert ours.state() == before
        if step % 50 == 0:  # saved and loaded
            fresh = LossScale(1.0, cpu, scale_window=5, hysteresis=hysteresis, refill=refill, least=4.0)
            fresh.load({k: v for k, v in vars(theirs).items() if isinstance(v, int | float)})
            ours = fresh
    assert min(seen) == 4.0
    assert max(seen) > 256.0


@pytest.mark.parametrize("hysteresis", [1, 2])
def test_the_loss_scale_is_exhausted_where_deepspeeds_raises(hysteresis: int) -> None:
    startup.init_process_group()
    ours = LossScale(16.0, torch.device("cpu"), scale_window=3, hysteresis=hysteresis, least=4.0)
    theirs = DynamicLossScaler(16.0, 3, 4.0, hysteresis, False)
    torch.manual_seed(2)
    raised = []
    for _ in range(100):
        overflow = torch.rand(()) < 0.6
        try:
            theirs.update_scale(bool(overflow))
            raised.append(False)
        except Exception:  # DeepSpeed's, of no type of its own
            theirs.last_overflow_iter, theirs.cur_iter = theirs.cur_iter, theirs.cur_iter + 1  # as if it had not
            raised.append(True)
        ours.update(overflow, overflow)
        assert bool(ours.exhausted) == raised[-1]
        assert ours.state() == {name: vars(theirs)[name] for name in LossScale.NAMES}
    assert 10 < sum(raised) < 60


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_no_scale_makes_finite(stage: int) -> None:
    """One clear failure under ZeRO, and one that the loop can see without asking the device under stage 0."""
    json = {"fp16": {"initial_scale_power": 1, "hysteresis": 1}}
    made = make_engine(stage, "fp16", json=json)
    assert not train_step(made, 0, bad=True)[2]  # to the smallest scale, 1
    if stage:
        assert made.exhausted() is None
        with pytest.raises(UserError, match="loss scale is at its smallest"):
            train_step(made, 1, bad=True)
        return
    assert not made.exhausted()
    train_step(made, 1, bad=True)
    assert made.exhausted()
    assert train_step(made, 2)[2]
    assert not made.exhausted()


def test_a_loss_scale_saved_by_deepspeeds_wrapper_of_stage_0() -> None:
    """Checkpoints from before this optimizer: no hysteresis in them."""
    made = LossScale(1.0, torch.device("cpu"), scale_window=1000, hysteresis=2)
    old = {"use_grad_scaling": True, "dynamic_loss_scale": True, "cur_iter": 41, "cur_scale": 2048.0}
    made.load({**old, "last_overflow_iter": 7, "scale_factor": 2.0, "scale_window": 1000, "min_loss_scale": 0.25})
    assert made.state() == {"cur_scale": 2048.0, "cur_iter": 41, "last_overflow_iter": 7, "cur_hysteresis": 2}


def test_an_overflow_halves_the_scale_under_every_stage_alike() -> None:
    engines = [make_engine(stage, "fp16", json={"fp16": {"initial_scale_power": 19}}) for stage in (0, 1, 2, 3)]
    found = []
    for made in engines:
        applied = [train_step(made, seed)[2] for seed in range(6)]
        found.append((applied, made.loss_scale()["cur_scale"], made.loss_scale()["cur_iter"]))
    assert not all(found[0][0]), "nothing overflowed"
    assert all(one == found[0] for one in found)


def test_a_constant_loss_scale() -> None:
    made, dynamic = make_engine(0, "fp16", json={"fp16": {"loss_scale": 4096}}), make_engine(0, "fp16")
    for seed in range(2):
        assert train_step(made, seed)[1] == pytest.approx(train_step(dynamic, seed)[1], rel=1e-3)
    assert made.loss_scale()["cur_scale"] == 4096


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_of_the_engine_reads_nothing(precision: str) -> None:
    """Between the gradients and the caller's look at the outcome, the host never waits; the outcome is the step's."""
    made, clean = (make_engine(0, precision) for _ in range(2))
    for seed in range(2):
        assert train_step(made, seed) == train_step(clean, seed)
    assert same_state(state_of(made), state_of(clean))
    assert isinstance(made.ds.optimizer, HalfPrecisionAdamW)
    for weight in made.model.parameters():
        weight.grad = torch.ones_like(weight)
    with NoWaits():
        made.ds.step()
    assert bool(made.ds.optimizer.applied)
