"""One optimizer step is the same under every ZeRO stage, and a bad one leaves no trace."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from lumina.config import UserError
from lumina.model import Transformer
from lumina.train.deepspeed import (
    Engine,
    allocate_optimizer_state,
    half_precision,
    moments,
    owned_fragments,
    parameter_groups,
    step_count,
)
from tests.train.tiny_engines import (
    EVERY,
    arrays,
    batch,
    make_config,
    make_engine,
    same_state,
    state_of,
    train_step,
    whole,
)


@contextmanager
def poisoned(made: Engine, bad: float) -> Iterator[None]:
    """Every gradient that passes the last norm is `bad`; the loss stays finite."""

    def spoil(module: object, arguments: object, output: tuple[Tensor, Tensor]) -> None:
        output[0].register_hook(lambda gradient: torch.full_like(gradient, bad))

    handle = made.model.norm.register_forward_hook(spoil)
    yield
    handle.remove()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("stage", "precision"), EVERY)
def test_a_bad_gradient_skips_the_step(stage: int, precision: str, bad: float) -> None:
    """Weights and moments are untouched, the caller is told, and the next steps are those of a run that never saw it:
    not a trace is left in gradients, moments or step counts."""
    made, clean = (make_engine(stage, precision) for _ in range(2))
    for seed in (1, 2):
        assert train_step(made, seed) == train_step(clean, seed)
    before = state_of(made)
    with poisoned(made, bad):
        loss, norm, applied = train_step(made, 3)
    assert math.isfinite(loss)
    assert not math.isfinite(norm)
    assert not applied
    assert same_state(before, state_of(made))
    assert all(torch.isfinite(value).all() for value in before.values())
    for seed in (4, 5):
        assert train_step(made, seed) == train_step(clean, seed)
    assert same_state(state_of(made), state_of(clean))


@pytest.mark.parametrize(("stage", "precision"), EVERY)
def test_a_first_bad_step(stage: int, precision: str) -> None:
    """Before the optimizer has any state."""
    made, clean = (make_engine(stage, precision) for _ in range(2))
    with poisoned(made, math.nan):
        assert not train_step(made, 3)[2]
    assert train_step(made, 4) == train_step(clean, 4)
    assert same_state(state_of(made), state_of(clean))


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("stage", "precision", "json"), [*((*one, {}) for one in EVERY), (1, "bf16", OFFLOAD), (3, "bf16", OFFLOAD)]
)
def test_a_norm_above_the_limit_skips_the_step(stage: int, precision: str, json: dict[str, Any]) -> None:
    """As a bad gradient does, but with its true norm told; a limit that is kept changes nothing."""
    made, clean = (make_engine(stage, precision, json=json) for _ in range(2))
    assert train_step(made, 1, limit=1e6) == train_step(clean, 1)
    before = state_of(made)
    loss, norm, applied = train_step(made, 2, limit=1e-6)
    assert not applied
    assert same_state(before, state_of(made))
    assert (loss, norm, True) == train_step(made, 2, limit=norm) == train_step(clean, 2)
    assert same_state(state_of(made), state_of(clean))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stages_agree(precision: str) -> None:
    """Losses, norms and weights after three steps, to rounding."""
    engines = [make_engine(stage, precision) for stage in (0, 1, 2, 3)]
    tolerance = 1e-5 if precision == "fp32" else 2e-3
    for seed in range(3):
        found = [train_step(made, seed) for made in engines]
        for loss, norm, applied in found:
            assert applied
            assert loss == pytest.approx(found[0][0], abs=tolerance)
            assert norm == pytest.approx(found[0][1], rel=10 * tolerance)
    reference = state_of(engines[0])
    for made in engines[1:]:
        state = state_of(made)
        assert state.keys() == reference.keys()
        for key, value in state.items():
            torch.testing.assert_close(value, reference[key], rtol=0, atol=1e-5 if precision == "fp32" else 5e-3)


@pytest.mark.parametrize("clip", [0.0, 0.05, 100.0])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_is_plain_adamw(stage: int, clip: float) -> None:
    """The sum of two micro-batches' gradients, clipped, through torch's own AdamW on the same model: one division by
    the token count, no other scale anywhere (law 2)."""
    eps = 1e-4  # not 1e-8: an element with almost no gradient would magnify rounding
    made = make_engine(stage, max_grad_norm=clip, adam_eps=eps)
    torch.manual_seed(0)
    config = make_config()
    model = Transformer(config)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.95), eps=eps)
    for seed in range(3):
        loss = torch.zeros(())
        for number in range(2):
            part = model(*whole(arrays(2 * seed + number))) / 40
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        ours = train_step(made, seed)
        assert ours[0] == pytest.approx(float(loss), rel=1e-5)
        assert ours[1] == pytest.approx(float(norm), rel=1e-4)
    found = state_of(made)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[f"master/{name}"], parameter.detach().flatten(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_of_different_lengths(stage: int) -> None:
    """An epoch's last step may have fewer micro-batches than the one before: their gradients are not scaled by it."""
    made, apart = make_engine(stage), make_engine(0)
    for engine in (made, apart):
        train_step(engine, 0)
        engine.accumulate(batch(7), 1 / 20, last=True)
        assert engine.step()[1]
    for key, value in state_of(made).items():
        torch.testing.assert_close(value, state_of(apart)[key], rtol=0, atol=2e-5)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_trains_alike_under_every_stage(recipe: str) -> None:
    """The weight is an argument that ZeRO-3 takes away between the passes; stages differ in the order of sums alone."""
    found = {}
    for stage in (0, 1, 2, 3):
        engine = make_engine(stage, "bf16", float8=recipe)
        losses = []
        for step in range(4):
            losses.append(float(engine.accumulate(batch(step), 1.0, last=True)))
            engine.step()
        engine.close()
        found[stage] = losses
    assert all(losses == pytest.approx(found[0], rel=1e-3) for losses in found.values())
    plain = make_engine(2, "bf16")
    assert float(plain.accumulate(batch(0), 1.0, last=True)) != found[2][0]
    plain.close()


MEMORYLESS = FakeTensor, FunctionalTensor  # what torch.compile traces with: other tests of the process leave some


def live_bytes() -> int:
    """Of every tensor that anything still refers to, each storage once."""
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not issubclass(type(o), MEMORYLESS)]
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in found)}.values())


_OF_EACH = {(0, "bf16"), (2, "fp16"), (3, "fp32")}


@pytest.mark.parametrize(
    ("stage", "precision"),
    [each if each in _OF_EACH else pytest.param(*each, marks=pytest.mark.long) for each in EVERY],
)
def test_nothing_of_a_closed_engine_lives_on(stage: int, precision: str) -> None:
    """Not even of one whose passes failed, which is why engines are closed: DeepSpeed keeps a list of modules, and
    torch the tasks of a backward pass that failed half way."""
    before = live_bytes()
    made = make_engine(stage, precision, hidden_size=64)
    train_step(made, 1)
    handle = made.model.blocks[1].register_forward_pre_hook(raise_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        train_step(made, 2)
    handle.remove()
    handle = made.model.blocks[0].register_forward_hook(fail_in_backward)
    with pytest.raises(torch.OutOfMemoryError):
        train_step(made, 3)
    handle.remove()
    kept = [weakref.ref(one) for one in (made, made.ds, made.ds.optimizer, made.model, *made.model.parameters())]
    made.close()
    full = live_bytes()
    del made, handle
    left = live_bytes() - before
    assert [ref() for ref in kept if ref() is not None] == []
    assert left <= 0.02 * full


def fail_in_backward(module: object, given: object, output: tuple[Tensor, Tensor]) -> None:
    output[0].register_hook(raise_out_of_memory)


def raise_out_of_memory(*given: object, **named: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(("stage", "precision"), EVERY)
def test_out_of_memory_inside_an_update(stage: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything was changed, and the engine says so; and after, and it says that too."""
    made = make_engine(stage, precision)
    train_step(made, 1)
    before, scale = state_of(made), made.loss_scale()
    with monkeypatch.context() as patched:
        patched.setattr(made.ds.optimizer, "step", raise_out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            train_step(made, 2)
    assert not made.begun
    assert same_state(before, state_of(made))
    if stage or precision == "fp32":
        monkeypatch.setattr(made.optimizer, "step", made._noted(raise_out_of_memory))
    else:
        monkeypatch.setattr(half_precision, "fused_adamw", raise_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        train_step(made, 3)
    assert made.begun
    assert made.loss_scale() == scale


@pytest.mark.parametrize(("stage", "precision"), EVERY)
def test_optimizer_state_is_allocated_ahead(stage: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there before the first step, no step is another for it, and a start without room for it says what to do."""
    made, lazy = (make_engine(stage, precision) for _ in range(2))
    allocate_optimizer_state(made)
    pieces = owned_fragments(made)
    assert all(set(moments(made, piece)) == {"exp_avg", "exp_avg_sq"} for piece in pieces)
    places = [moments(made, piece)["exp_avg"].data_ptr() for piece in pieces]
    assert step_count(made) == 0
    for seed in (1, 2):
        assert train_step(made, seed) == train_step(lazy, seed)
    assert same_state(state_of(made), state_of(lazy))
    assert places == [moments(made, piece)["exp_avg"].data_ptr() for piece in pieces]
    monkeypatch.setattr(torch, "empty", raise_out_of_memory)
    with pytest.raises(UserError, match="has no memory for an update of its"):
        allocate_optimizer_state(made)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_key_of_the_json_switches_the_refusal_off(stage: int, check: bool) -> None:
    """DeepSpeed's bf16.check_grad_overflow = false lets NaN into the weights under stages 1 and 2."""
    made = make_engine(stage, "bf16", json={"bf16": {"check_grad_overflow": check}})
    train_step(made, 1)
    before = state_of(made)
    with poisoned(made, math.nan):
        assert not train_step(made, 2)[2]
    assert not train_step(made, 3, limit=1e-6)[2]
    assert same_state(before, state_of(made))
