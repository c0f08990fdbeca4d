"""The training state as fragments, and moving it between stages through a checkpoint."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from lumina import checkpoint
from lumina.checkpoint import MASTER, TrainerState
from lumina.train.deepspeed import Engine, fragments_to_load, moments, owned_fragments, step_count
from lumina.train.saving import snapshot
from tests.train.tiny_engines import EVERY, batch, make_engine, same_state, save, state_of, train_step

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def shapes(made: Engine) -> dict[str, int]:
    """Elements of every parameter, which ZeRO-3 has put out of sight of numel()."""
    return {name: getattr(p, "ds_numel", p.numel()) for name, p in made.model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("stage", "precision"), EVERY)
def test_fragments_cover_every_parameter_once(stage: int, precision: str, tied: bool) -> None:
    made = make_engine(stage, precision, tie_word_embeddings=tied)
    train_step(made, 0)
    for pieces in (owned_fragments(made), fragments_to_load(made)):
        covered: dict[str, list[tuple[int, int]]] = {}
        for piece in pieces:
            covered.setdefault(piece.name, []).append((piece.start, piece.numel))
            assert piece.view(piece.owner).dtype is torch.float32
            assert piece.view(piece.owner).numel() == piece.numel
            assert set(moments(made, piece)) == {"exp_avg", "exp_avg_sq"}
        assert covered == {name: [(0, numel)] for name, numel in shapes(made).items()}
    # No two of them share memory: every one is the parameter's own.
    spans = sorted((p.view(p.owner).data_ptr(), p.numel * 4) for p in owned_fragments(made))
    for (place, size), (following, _) in itertools.pairwise(spans):
        assert place + size <= following


@pytest.mark.parametrize(("stage", "precision"), EVERY)
def test_fragments_are_the_weights(stage: int, precision: str) -> None:
    """Named right, in the parameter's own order, and float32: before the first step they are what was drawn."""
    made, plain = make_engine(stage, precision), make_engine(0)
    for name, parameter in plain.model.named_parameters():
        own = state_of(made)[f"{MASTER}/{name}"]
        drawn = parameter.detach().flatten()
        expected = drawn if precision == "fp32" else drawn.to(DTYPES[precision]).float()
        assert torch.equal(own, drawn) or torch.equal(own, expected), name


@pytest.mark.parametrize(("stage", "precision"), EVERY)
def test_weights_alone_start_a_new_run(tmp_path: Path, stage: int, precision: str) -> None:
    """Another run's weights to the bit, under whatever stage, and no trace of its optimizer."""
    path, old = saved(tmp_path, 1)
    fresh = make_engine(stage, precision)
    snapshot.load_weights(path, fresh)
    given, taken = state_of(old), state_of(fresh)
    masters = [key for key in given if key.startswith(f"{MASTER}/")]
    assert masters
    assert all(torch.equal(given[key], taken[key]) for key in masters)
    assert step_count(fresh) == 0
    assert not any(value.any() for piece in owned_fragments(fresh) for value in moments(fresh, piece).values())


def saved(folder: Path, stage: int, precision: str = "fp32") -> tuple[Path, Engine]:
    """A checkpoint after two steps, and the engine that wrote it."""
    made = make_engine(stage, precision)
    for seed in (0, 1):
        train_step(made, seed)
    return save(folder, made, TrainerState(step=2)), made


def loaded(source: Path, stage: int, precision: str = "fp32") -> Engine:
    """Another engine, of other weights, with the checkpoint loaded into it."""
    made = make_engine(stage, precision, seed=77)
    told: list[tuple[int, int]] = []
    snapshot.load_checkpoint(source, made, checkpoint.read_trainer_state(source)[1], lambda *each: told.append(each))
    assert told == [(number, len(told)) for number in range(1, len(told) + 1)] != []
    return made


@pytest.mark.parametrize(("stage", "precision"), EVERY)
def test_loading_at_the_same_stage(stage: int, precision: str, tmp_path: Path) -> None:
    """Bit-identical: weights, moments, step count, the half-precision copy, the random state, and the next steps."""
    source, first = saved(tmp_path, stage, precision)
    assert step_count(first) == 2
    torch.manual_seed(4)
    snapshot.load_checkpoint(source, first, checkpoint.read_trainer_state(source)[1])
    random = torch.get_rng_state()
    before = state_of(first)
    assert len(before) == 3 * len(shapes(first))
    second = loaded(source, stage, precision)
    assert torch.equal(torch.get_rng_state(), random)
    assert step_count(second) == 2
    assert same_state(before, state_of(second))
    first.ds.eval(), second.ds.eval()
    with torch.no_grad():
        assert torch.equal(first.loss(batch(9)), second.loss(batch(9)))
    first.ds.train(), second.ds.train()
    for seed in (2, 3):
        assert train_step(first, seed) == train_step(second, seed)
    assert same_state(state_of(first), state_of(second))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_from_stage_to_stage(precision: str, tmp_path: Path) -> None:
    """1 -> 3 -> 0 -> 2 -> 1: not a bit of the state changes on the way, and training goes on alike."""
    source, first = saved(tmp_path / "1", 1, precision)
    expected = state_of(first)
    engines = []
    for stage in (3, 0, 2, 1):
        made = loaded(source, stage, precision)
        assert same_state(expected, state_of(made)), stage
        assert step_count(made) == 2
        source = save(tmp_path / f"to-{stage}", made, TrainerState(step=2))
        engines.append(made)
    wanted = train_step(first, 5)
    for made in engines:
        assert train_step(made, 5) == pytest.approx(wanted, rel=1e-5 if precision == "fp32" else 5e-3)
        for key, value in state_of(made).items():
            torch.testing.assert_close(value, state_of(first)[key], rtol=0, atol=1e-5 if precision == "fp32" else 5e-3)


def test_weights_for_generation(tmp_path: Path) -> None:
    """iter_weights gives the shaped float32 weights of any stage's checkpoint."""
    sizes = {name: p.shape for name, p in make_engine(0).model.named_parameters()}
    for stage in (0, 3):
        source, made = saved(tmp_path / str(stage), stage, "bf16")
        state = state_of(made)
        for name, weight in checkpoint.iter_weights(source, sizes):
            assert weight.dtype is torch.float32
            assert weight.shape == sizes[name]
            assert torch.equal(weight.flatten(), state[f"{MASTER}/{name}"])


def test_a_checkpoint_without_moments(tmp_path: Path) -> None:
    """Saved before the first step: there are none, and loading it is a fresh start."""
    source = save(tmp_path, make_engine(0), TrainerState(step=0))
    second = loaded(source, 0)
    assert same_state(state_of(make_engine(0)), state_of(second))
    clean = make_engine(0)
    assert train_step(second, 1) == train_step(clean, 1)
