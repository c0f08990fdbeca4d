"""Faults planted in real runs: each ends well, with finite weights, every answer in the event log, twice the same."""

from __future__ import annotations

import json
import math
import signal
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.runs as real
from lumina import checkpoint
from lumina.data import StepData
from lumina.monitor.events import read_events
from lumina.monitor.run_json import read_run
from lumina.train import build, loop, make_engine
from lumina.train import step as step_module
from lumina.train.deepspeed import Engine
from lumina.train.recovery import apply
from lumina.train.saving import snapshot
from tests.runs import Runs, State, arguments, differing, final

pytestmark = pytest.mark.timeout(900)  # the first start on a machine compiles DeepSpeed's operators

EVERY = 3
SETTINGS: dict[str, Any] = {
    "precision": "fp32",
    "save_every_n_batches": EVERY,
    "batch_size": 2,
    "global_batch_size": 4,
    "learning_rate": 1e-3,
    "health_warmup": 4,
    "health_window": 16,
    "health_check_interval": 4,
    "keep_last": 9,
}


def events(run: Path, **wanted: Any) -> list[dict[str, Any]]:
    """The run's events with these values."""
    return [e for e in read_events(run / "events.jsonl") if all(e.get(key) == value for key, value in wanted.items())]


def finite(state: State) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in state.values())


# --- Bad steps ------------------------------------------------------------------------------------


def _hook(module: torch.nn.Module, hook: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Have `hook` called with the gradient of the module's output."""

    def attach(module: object, given: object, output: Any) -> None:
        (output if isinstance(output, torch.Tensor) else output[0]).register_hook(hook)

    return module.register_forward_hook(attach)


def _spoil(rank: int, *, nan: tuple[int, ...] = (), spikes: tuple[int, ...] = ()) -> None:
    """NaN in rank 0's gradients at the steps `nan`; loss and gradient 20 times as large at `spikes`, on rank 0."""
    original = step_module.accumulate

    def spoiled(run: Any, data: StepData) -> Any:
        if rank != 0:
            return original(run, data)
        step = data.step + 1
        if step in spikes:
            whole = data.supervised_tokens
            data.supervised_tokens = whole / 20
            found = original(run, data)
            data.supervised_tokens = whole
            return found
        if step in nan:
            handle = _hook(run.state.engine.model.norm, lambda gradient: torch.full_like(gradient, math.nan))
            found = original(run, data)
            handle.remove()
            return found
        return original(run, data)

    step_module.accumulate = spoiled


BAD = {"nan": (6,), "spikes": (8, 12, 13, 14)}
BAD_STEPS = [6, 8, 12, 13, 14]
STEPS = 17


def samples_of(run: Path, step: int) -> str:
    return next(record["samples"] for record in real.steps(run) if record["step"] == step)


@pytest.mark.parametrize(
    ("world", "stage", "size"),
    [
        (1, 0, 1),
        (2, 2, 1),
        *(pytest.param(2, stage, size, marks=pytest.mark.long) for stage, size in ((1, 1), (3, 1), (2, 2))),
    ],
)
def test_bad_steps_are_skipped_and_repeated_ones_roll_back(
    world: int, stage: int, size: int, runs: Runs, conversations: Path, place: Path
) -> None:
    """A NaN and a spike are skipped. Three spikes in a row bring the run back to the checkpoint before them, and it
    goes past their samples. The end is that of a run which never trained on the five bad steps."""
    bad, clean = place / "bad", place / "clean"
    # An asynchronous save is put off while the one before it is still being written: which checkpoint there is to go
    # back to would depend on the disk.
    settings = {**SETTINGS, "max_steps": STEPS, "save_async": False, "sequence_parallel_size": size}
    job = runs.start(arguments(bad, conversations, stage=stage, **settings), world, partial(_spoil, **BAD))
    assert job.wait() == [0] * world, job.stderr()

    assert [e["step"] for e in events(bad, kind="recovery", rule="not-finite")] == [6]
    spikes = events(bad, kind="recovery", rule="loss-spike")
    assert [e["step"] for e in spikes] == [8, 12, 13, 14]
    assert all(len(e["samples"]) == 4 and "skipped" in e["action"] for e in spikes)
    (back,) = [e for e in events(bad, rule="rollback") if e["level"] == "crit"]
    assert back["values"] == {"to": 9, "skipped_steps": [12, 13, 14], "rollbacks": 1}
    assert "WARN(step 8: loss" in job.stdout()

    clean.mkdir()
    # As 0.1.0 left it on two ranks, as it is left now on one.
    old = world == 2
    (clean / ("answers.json" if old else "recovery.json")).write_text(
        json.dumps({"past" if old else "skipped_steps": BAD_STEPS})
    )
    runs.train([*arguments(clean, conversations, stage=stage, **settings), "--resume", "auto"], world)
    end = final(bad, STEPS)
    assert finite(end)
    assert differing(end, final(clean, STEPS)) == []
    taken = [record["step"] for record in real.steps(bad) if record["applied"]]
    assert taken == [step for step in range(1, STEPS + 1) if step not in BAD_STEPS]


def test_killed_amid_a_rollback(runs: Runs, conversations: Path, place: Path) -> None:
    """Resumed, it goes past the same samples and comes to the same end."""
    killed, whole = place / "killed", place / "whole"
    settings = {**SETTINGS, "max_steps": STEPS}
    argv = arguments(killed, conversations, stage=2, **settings)
    job = runs.start(argv, patch=_die_in_rollback)
    assert job.wait() == [-signal.SIGKILL]
    assert json.loads((killed / "recovery.json").read_text())["skipped_steps"] == [12, 13, 14]
    job = runs.start([*argv, "--resume", "auto"], patch=partial(_spoil, **BAD))
    assert job.wait() == [0], job.stderr()
    job = runs.start(arguments(whole, conversations, stage=2, **settings), patch=partial(_spoil, **BAD))
    assert job.wait() == [0]
    assert differing(final(killed, STEPS), final(whole, STEPS)) == []


def _die_in_rollback(rank: int) -> None:
    import os

    _spoil(rank, **BAD)
    snapshot.load_checkpoint = lambda *given: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]


def _half_precision(rank: int, *, nan: tuple[int, ...], loss: bool) -> None:
    """fp16 on a CPU, from these steps on with a NaN: in the gradients, or in the weights and so in the loss."""
    from lumina.config import precision
    from tests.train.tiny_engines import fp16_on_a_cpu

    precision.resolve = lambda *given, **named: "fp16"  # type: ignore[assignment]
    contexts.append(fp16_on_a_cpu())
    contexts[-1].__enter__()
    if not loss:
        _spoil(rank, nan=nan)
        return
    original = step_module.accumulate

    def spoiled(run: Any, data: StepData) -> Any:
        if data.step + 1 not in nan:
            return original(run, data)
        handle = run.state.engine.model.norm.register_forward_hook(
            lambda module, given, output: tuple(math.nan * one for one in output)
        )
        found = original(run, data)
        handle.remove()
        return found

    step_module.accumulate = spoiled


contexts: list[Any] = []  # kept open for the life of a rank's process


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("loss", [False, True])
def test_fp16_without_end(loss: bool, stage: int, runs: Runs, conversations: Path, place: Path) -> None:
    """Gradients that are not finite at the smallest loss scale end the run where DeepSpeed's scaler gives up, under
    every stage; a loss that is not finite is no matter of the scale, and is answered as in any precision."""
    document = json.loads((real.ROOT / f"ds_configs/zero{stage}.json").read_text())
    document["fp16"] = {"enabled": True, "initial_scale_power": 12 if loss else 2, "hysteresis": 1}
    document["bf16"] = {"enabled": False}
    (place / "ds.json").write_text(json.dumps(document))
    settings = {**SETTINGS, "precision": "fp16", "max_steps": 30, "max_rollbacks": 1, "save_async": False}
    argv = [*arguments(place / "run", conversations, **settings), "--ds_config", str(place / "ds.json")]
    job = runs.start(argv, patch=partial(_half_precision, nan=tuple(range(5, 31)), loss=loss))
    assert job.wait() == [2], job.stderr()
    assert "Traceback" not in job.stderr()
    if loss:
        assert "after 1 rollbacks" in job.stderr()
        return
    assert "loss scale is at its smallest" in job.stderr()
    # Scales of 4, 2 and 1 at the steps 5, 6 and 7; under ZeRO the last one fails before it has a record.
    assert [record["step"] for record in real.steps(place / "run")][-1] == (6 if stage else 7)


def test_spikes_without_end(runs: Runs, conversations: Path, place: Path) -> None:
    """The rollbacks are bounded; then the run fails and says so, and its last good checkpoint is there."""
    run = place / "run"
    spikes = tuple(range(10, 60))
    argv = arguments(run, conversations, stage=1, max_steps=60, max_rollbacks=2, **SETTINGS)
    job = runs.start(argv, patch=partial(_spoil, spikes=spikes))
    assert job.wait() == [2]
    assert "after 2 rollbacks" in job.stderr()
    assert "Traceback" not in job.stderr()
    assert checkpoint.integrity_error(real.newest(run)) is None
    assert finite(real.state(real.newest(run)))


# --- Out of memory --------------------------------------------------------------------------------


def _watch_rebuilds() -> None:
    """Fails a rank where the engine before is still held when the next one is built: both would have to fit."""
    make, earlier = make_engine.make_engine, []

    def watched(settings: Any, drawn: bool, *more: Any) -> Engine:
        held = [engine for engine in earlier if engine() is not None]
        assert not held, "the old engine is alive while the new one is built"
        made = make(settings, drawn, *more)
        earlier.append(weakref.ref(made.ds))
        return made

    build.make_engine = apply.make_engine = watched


def _run_out(rank: int, *, steps: dict[int, str]) -> None:
    """torch's out-of-memory error at the first try of these steps: before the first micro-batch, or in the middle of a
    backward pass."""
    _watch_rebuilds()
    original, tried = step_module.accumulate, set()

    def full(gradient: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more.")

    def failing(run: Any, data: StepData) -> Any:
        step = data.step + 1
        if step not in steps or step in tried:
            return original(run, data)
        tried.add(step)
        if steps[step] == "start":
            handle = run.state.engine.model.register_forward_pre_hook(lambda module, given: full(None))
        else:
            handle = _hook(run.state.engine.model.blocks[0], full)
        try:
            return original(run, data)
        finally:
            handle.remove()

    step_module.accumulate = failing


@pytest.mark.parametrize(
    ("world", "stage", "where"),
    [
        (1, 0, "middle"),
        (2, 2, "start"),
        *(pytest.param(1, stage, "middle", marks=pytest.mark.long) for stage in (2, 3)),
    ],
)
def test_out_of_memory_halves_the_micro_batch(
    world: int, stage: int, where: str, runs: Runs, conversations: Path, place: Path
) -> None:
    """Adam's first moment after the first step is a tenth of its gradient: that is compared, to 1e-6."""
    full, small = place / "full", place / "small"
    settings = {**SETTINGS, "batch_size": 4, "global_batch_size": 8, "max_steps": 4, "save_every_n_batches": 1}
    settings |= {"save_async": False, "max_grad_norm": 0.0}
    runs.train(arguments(full, conversations, stage=stage, **settings), world)
    patch = partial(_run_out, steps={1: where, 3: where})
    job = runs.start(arguments(small, conversations, stage=stage, **settings), world, patch)
    assert job.wait() == [0] * world, job.stderr()
    told = events(small, rule="out-of-memory")
    assert [(e["step"], e["action"][:16]) for e in told] == [
        (1, "micro-batch 4 -> "[:16]),
        (3, "micro-batch 2 -> "[:16]),
    ]
    for step, tolerance in ((1, 1e-6), (4, 1e-4)):
        one, other = (real.state(run / "checkpoints" / checkpoint.name_of(step)) for run in (full, small))
        for (kind, name), value in one.items():
            if kind == "exp_avg" or step == 4:
                error = float((value - other[kind, name]).double().norm())
                assert error <= tolerance * float(value.double().norm()) + 1e-12, (step, kind, name)
    assert [r["samples"] for r in real.steps(full)] == [r["samples"] for r in real.steps(small)]
    assert [r["step"] for r in real.steps(small)] == [1, 2, 3, 4]


def test_out_of_memory_with_one_sample_is_a_clear_failure(runs: Runs, conversations: Path, place: Path) -> None:
    settings = {**SETTINGS, "batch_size": 1, "max_steps": 4}
    job = runs.start(arguments(place / "run", conversations, **settings), patch=partial(_run_out, steps={2: "middle"}))
    assert job.wait() == [2]
    assert "micro-batch of one sample" in job.stderr()


def _run_out_late(rank: int, *, step: int, only: int | None) -> None:
    """Out of memory in the backward pass of a step's second micro-batch: the first one's gradients have been reduced
    over the ranks by then."""
    original = step_module.accumulate

    def failing(run: Any, data: StepData) -> Any:
        if data.step + 1 != step or only not in (None, rank):
            return original(run, data)
        passes = []

        def full(gradient: torch.Tensor) -> torch.Tensor:
            passes.append(run.state.engine.collectives)
            if len(passes) == 2:
                assert passes == [True, True], "no collective was begun"
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return gradient

        handle = _hook(run.state.engine.model.blocks[0], full)
        try:
            return original(run, data)
        finally:
            handle.remove()

    step_module.accumulate = failing


# Saved at once: which checkpoint is the newest when a rank fails would else depend on the disk.
SHARED: dict[str, Any] = {
    "batch_size": 2,
    "global_batch_size": 8,
    "max_steps": 6,
    "emergency_seconds": 3,
    "save_async": False,
}


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The step records of a run on two ranks that nothing happens to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    runs.train(arguments(run, conversations, stage=2, **{**SETTINGS, **SHARED, "save_every_n_batches": 100}), 2)
    return real.steps(run)


@pytest.mark.parametrize(
    ("stage", "only", "size"),
    [(2, 1, 1), *(pytest.param(*case, marks=pytest.mark.long) for case in ((3, None, 1), (2, 1, 2)))],
)
def test_out_of_memory_amid_a_collective_ends_the_start(
    stage: int,
    only: int | None,
    size: int,
    runs: Runs,
    conversations: Path,
    place: Path,
    undisturbed: list[dict[str, Any]],
) -> None:
    """One rank alone, while the other sits in the collective, or both. The next start takes half the micro-batch, and
    the run's losses are those of one that was never disturbed."""
    run = place / "run"
    argv = arguments(run, conversations, stage=stage, **{**SETTINGS, **SHARED}, sequence_parallel_size=size)
    job = runs.start(argv, 2, partial(_run_out_late, step=5, only=only))
    codes = job.wait()
    assert codes == [2, 2], job.stderr()  # the user's turn: UserError, on the rank that lost the other one too
    assert "Traceback" not in job.stderr()
    assert "Start the run again with --resume auto: it then takes micro-batches of 1" in job.stderr()
    assert checkpoint.integrity_error(real.newest(run)) is None
    assert real.newest(run).name == checkpoint.name_of(EVERY)

    runs.train([*argv, "--resume", "auto"], 2)
    _first, second = read_run(run)["starts"]
    assert (second["changed"]["batch_size"], second["changed"]["gradient_accumulation_steps"]) == (1, 4 * size)
    assert "global_batch_size" not in second["changed"]
    taken = real.steps(run)
    for what in ("step", "samples", "supervised_tokens"):
        assert [record[what] for record in taken] == [record[what] for record in undisturbed], what
    assert [r["loss"] for r in taken] == pytest.approx([r["loss"] for r in undisturbed], rel=1e-5)


def _run_out_in_update(rank: int, *, step: int, only: int | None, late: bool) -> None:
    """Out of memory at the first try of a step's update: before it has changed anything, or when it has."""
    _watch_rebuilds()
    original, tried = Engine._step, set()

    def failing(self: Any, limit: Any) -> Any:
        if int(self.ds.global_steps) + 1 != step or only not in (None, rank) or tried:
            return original(self, limit)
        tried.add(step)
        if late:
            original(self, limit)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more.")

    Engine._step = failing  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("world", "stage"),
    [(1, 0), *(pytest.param(2, stage, marks=pytest.mark.long) for stage in range(4))],
)
def test_out_of_memory_in_an_update_that_nobody_began(
    world: int, stage: int, runs: Runs, conversations: Path, place: Path
) -> None:
    """The step is taken again with half the micro-batch; the losses are those of a run that was never disturbed. The
    layers' statistics, begun before the update, hold the old engine no longer than anything else."""
    settings = {**SETTINGS, "batch_size": 4, "global_batch_size": 8, "max_steps": 4, "precision": "bf16"}
    settings["layer_stats_every"] = 3
    whole, run = place / "whole", place / "run"
    patch = partial(_run_out_in_update, step=3, only=None, late=False)
    job = runs.start(arguments(run, conversations, stage=stage, **settings), world, patch)
    assert job.wait() == [0] * world, job.stderr()
    assert [(e["step"], e["action"][:20]) for e in events(run, rule="out-of-memory")] == [(3, "micro-batch 4 -> 2, ")]
    runs.train(arguments(whole, conversations, stage=stage, **settings), world)
    assert [r["loss"] for r in real.steps(run)] == pytest.approx([r["loss"] for r in real.steps(whole)], rel=2e-3)


@pytest.mark.parametrize(
    ("world", "stage", "only", "late"),
    [
        (2, 2, 1, False),
        pytest.param(1, 0, None, True, marks=pytest.mark.long),
        pytest.param(2, 3, None, True, marks=pytest.mark.long),
    ],
)
def test_out_of_memory_in_an_update_that_was_begun(
    world: int, stage: int, only: int | None, late: bool, runs: Runs, conversations: Path, place: Path
) -> None:
    """By this rank, or by others while this one could not: the next start goes on from the last checkpoint."""
    run = place / "run"
    argv = arguments(run, conversations, stage=stage, **{**SETTINGS, **SHARED, "save_every_n_batches": 2})
    job = runs.start(argv, world, partial(_run_out_in_update, step=4, only=only, late=late))
    codes = job.wait()
    assert codes == [2] * world, job.stderr()
    assert "ran out of memory inside the update" in job.stderr()
    assert real.newest(run).name == checkpoint.name_of(2)
    runs.train([*argv, "--resume", "auto"], world)
    assert [record["step"] for record in real.steps(run)] == [1, 2, 3, 4, 5, 6]
    assert read_run(run)["starts"][1]["changed"]["batch_size"] == 1


# --- A sample that cannot be read -----------------------------------------------------------------


def _poison(rank: int, *, sample: int) -> None:
    from lumina.data import PackedDataset

    original = PackedDataset.batch

    def batch(self: PackedDataset, indices: Any, *part: Any) -> Any:
        found = original(self, indices, *part)
        if sample in [int(index) for index in indices]:
            found.ids_T[0] = 2**30  # what a flipped bit in the cache file makes of a token
        return found

    PackedDataset.batch = batch  # type: ignore[method-assign]


@pytest.mark.parametrize(("world", "stage", "size"), [(2, 3, 1), pytest.param(2, 2, 2, marks=pytest.mark.long)])
def test_a_poisoned_sample(world: int, stage: int, size: int, runs: Runs, conversations: Path, place: Path) -> None:
    run = place / "run"
    argv = arguments(run, conversations, stage=stage, **{**SETTINGS, "max_steps": 40, "sequence_parallel_size": size})
    job = runs.start(argv, world, partial(_poison, sample=5))
    assert job.wait() == [0] * world, job.stderr()
    told = events(run, rule="corrupt-sample", kind="recovery")
    assert told
    assert all(e["samples"] == [5] for e in told)
    assert finite(final(run, 40))
    assert all(record["applied"] for record in real.steps(run))


# --- Exceptions and signals -----------------------------------------------------------------------


def _raise_in_evaluation(rank: int, *, step: int, only: int | None) -> None:
    original = loop.evaluate

    def evaluate(engine: Any, *given: Any) -> tuple[float, dict[str, float]]:
        if step == int(engine.ds.global_steps) and only in (None, rank):
            raise RuntimeError("planted in evaluation")
        return original(engine, *given)

    loop.evaluate = evaluate


def _raise_in_a_pass(rank: int, *, step: int, only: int | None) -> None:
    """In the backward pass of the step after `step`, whose numbers have not been read by then."""
    original = step_module.accumulate

    def failing(run: Any, data: StepData) -> Any:
        assert run.deferred.pending == (data.step > 0 and data.step != 5)  # the evaluation after step 5 reads it
        if data.step != step or only not in (None, rank):
            return original(run, data)

        def fail(gradient: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("planted in a pass")

        _hook(run.state.engine.model.blocks[0], fail)
        return original(run, data)

    step_module.accumulate = failing


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real.write_conversations(tmp_path_factory.mktemp("eval") / "eval.jsonl", 10, seed=5)


@pytest.mark.parametrize(
    ("patch", "step", "world"),
    [
        pytest.param(_raise_in_evaluation, 5, 1, marks=pytest.mark.long),
        pytest.param(_raise_in_evaluation, 5, 2, marks=pytest.mark.long),
        (_raise_in_a_pass, 4, 1),
    ],
)
def test_an_exception_leaves_an_emergency_checkpoint(
    patch: Callable[..., None], step: int, world: int, runs: Runs, conversations: Path, held_out: Path, place: Path
) -> None:
    broken, whole = place / "broken", place / "whole"
    settings = {**SETTINGS, "max_steps": 7, "eval_every_n_batches": 5, "save_every_n_batches": 100}
    more = ["--eval-data", str(held_out)]
    argv = [*arguments(broken, conversations, stage=2, **settings), *more]
    job = runs.start(argv, world, partial(patch, step=step, only=None))
    codes = job.wait()
    assert all(code not in (0, 75) for code in codes), codes
    assert "planted in" in job.stderr()
    saved = real.newest(broken)
    assert saved.name == checkpoint.name_of(step)
    assert checkpoint.integrity_error(saved) is None
    assert checkpoint.read_trainer_state(saved)[1]["emergency"].startswith("RuntimeError: planted in")
    (told,) = events(broken, rule="exception")
    assert told["action"] == f"emergency checkpoint of step {step}"
    assert [record["step"] for record in real.steps(broken)] == list(range(1, step + 1))

    runs.train([*argv, "--resume", "auto"], world)
    runs.train([*arguments(whole, conversations, stage=2, **settings), *more], world)
    assert differing(final(broken, 7), final(whole, 7)) == []


def test_an_emergency_of_one_rank_alone_saves_nothing(
    runs: Runs, conversations: Path, held_out: Path, place: Path
) -> None:
    """The other sits in a collective and cannot say where it stands: no checkpoint, within the time given, and the
    earlier one is as it was."""
    run = place / "run"
    settings = {**SETTINGS, "max_steps": 7, "eval_every_n_batches": 5, "emergency_seconds": 2, "save_async": False}
    argv = [*arguments(run, conversations, stage=2, **settings), "--eval-data", str(held_out)]
    job = runs.start(argv, 2, partial(_raise_in_evaluation, step=5, only=0))
    assert all(code not in (0, 75) for code in job.wait())
    assert [path.name for path in checkpoint.list_checkpoints(run / "checkpoints")] == [checkpoint.name_of(EVERY)]
    assert checkpoint.integrity_error(real.newest(run)) is None
    assert events(run, rule="exception")


def _unreadable(rank: int) -> None:
    """Rank 1 reads for longer than the other one, and then its disk fails."""
    whole = checkpoint.CheckpointReader.read

    def read(self: checkpoint.CheckpointReader, *given: Any) -> None:
        if rank == 1:
            time.sleep(1.0)
            raise OSError(5, "Input/output error", "shard")
        whole(self, *given)

    checkpoint.CheckpointReader.read = read  # type: ignore[method-assign]


@pytest.mark.long  # tests/train/saving/test_snapshot.py has the order, and this that a start goes by it
def test_a_checkpoint_that_one_rank_cannot_read_ends_both(runs: Runs, conversations: Path, place: Path) -> None:
    line = arguments(place / "run", conversations, stage=2, **SETTINGS | {"max_steps": 2, "save_every_n_batches": 1})
    runs.train([*line, "--set", "max_steps=1"], 2)
    job = runs.start([*line, "--resume", "auto"], 2, patch=_unreadable)
    assert job.wait() == [2, 2], job.stderr()
    assert "rank 1 on" in job.stderr()
    assert "Input/output error" in job.stderr()
    assert "Traceback" not in job.stderr()
