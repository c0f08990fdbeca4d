"""A steady step waits for the device once at most, and then when its own passes are queued."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Runs, arguments

STEPS, STEADY = 8, (6, 7)  # from the sixth step on there is a baseline; the last one is read at once
CASES = [(stage, precision) for precision in ("bf16", "fp32") for stage in (0, 1, 2, 3)]
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "batch_size": 2,
    "save_every_n_batches": 100,
    "health_warmup": 4,
    "straggler_interval": 0,
}


def _measure(rank: int, *, runs: dict[str, list[str]], out: Path) -> None:
    """Trains each of `runs`, in this process, and leaves in `out` what its steady steps waited for, and when."""
    import lumina.train
    from lumina.cli import main
    from lumina.train import Callback, Context, StepResult, loop, run, step
    from lumina.train.deferred import Readback
    from tests.train.host_waits import Recorder

    class Watching(Callback):
        """Asked at every step: what it must leave as it was is compared without a wait too."""

        def before_step(self, context: Context) -> None:
            context.log("step", context.step)

        def after_step(self, context: Context, result: StepResult) -> None:
            context.log("loss", result.loss)

    recorder = Recorder()
    lumina.train.train = partial(lumina.train.train, callbacks=[Watching()])  # type: ignore[assignment]
    order: dict[int, list[str]] = {}
    take_step, read = loop.take_step, Readback.read

    def counted(run: Any, data: Any) -> Any:
        recorder.step = data.step + 1
        return take_step(run, data)

    def deliberate(self: Readback) -> Any:
        recorder.note("the step before")
        recorder.allowed = "read"
        found = read(self)
        recorder.allowed = ""
        order.setdefault(recorder.step or 0, []).append("read")
        return found

    def ordered(name: str) -> None:
        call = getattr(step, name)

        def noted(*given: Any) -> Any:
            found = call(*given)
            order.setdefault(recorder.step or 0, []).append(name)
            return found

        setattr(step, name, noted)

    loop.take_step, Readback.read = counted, deliberate  # type: ignore[method-assign]
    ordered("accumulate")
    ordered("update")
    run.destroy_process_group = lambda: None  # the next one joins the same group
    lumina.train.end_process = lambda code: code
    recorder.install()
    found = {}
    for name, argv in runs.items():
        recorder.step = None
        recorder.waits.clear()
        order.clear()
        assert main(["train", *argv]) == 0
        found[name] = {number: (recorder.at(number), order[number]) for number in STEADY}
    if rank == 0:
        out.write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


@pytest.mark.parametrize(("world", "cases"), [(1, CASES), (2, [(2, "fp32"), (3, "bf16")])])
def test_a_steady_step_waits_once(
    world: int, cases: list[tuple[int, str]], runs: Runs, conversations: Path, place: Path
) -> None:
    more = {**SETTINGS, "global_batch_size": 4 * world}
    argv = {
        f"{stage}-{precision}": arguments(
            place / f"{stage}-{precision}", conversations, stage=stage, precision=precision, **more
        )
        for stage, precision in cases
    }
    job = runs.start([], world, partial(_measure, runs=argv, out=place / "waits.json"))
    assert job.wait() == [0] * world, job.stderr()
    found = json.loads((place / "waits.json").read_text())
    assert found.keys() == argv.keys()
    for case, steps in found.items():
        for step, (places, order) in steps.items():
            assert list(places.values()) == [1], f"{case}, step {step}: {places}"
            assert next(iter(places)).endswith("the step before")
            assert order == ["accumulate", "read", "update"], "it waits with nothing queued"


def test_the_recorder_sees_what_waits(runs: Runs, tmp_path: Path) -> None:
    """Each kind of it, in a process of its own."""
    job = runs.start([], 1, partial(_look, out=tmp_path / "seen.json"))
    assert job.wait() == [0], job.stderr()
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen == [1] * len(seen)
    assert len(seen) == 13


def _look(rank: int, *, out: Path) -> None:
    import torch
    from deepspeed.accelerator import get_accelerator

    from tests.train.host_waits import Recorder

    recorder, found, value = Recorder(), [], torch.tensor([1.0, 2.0])
    recorder.install()
    accelerator: Any = get_accelerator()
    waiting = [
        lambda: value[0].item(),
        lambda: float(value[0]),
        lambda: bool(value[0]),
        lambda: 1.0 if value[0] > 0 else 0.0,
        lambda: value.tolist(),
        lambda: value.cpu(),
        lambda: value.nonzero(),
        lambda: value[value > 0],
        lambda: torch.equal(value, value),
        lambda: torch.tensor(1.0, device="cpu"),
        lambda: accelerator.FloatTensor([1.0]),
        lambda: accelerator.synchronize(),
        lambda: accelerator.current_stream().synchronize(),
    ]
    for call in waiting:
        recorder.waits.clear()
        recorder.step = 1
        call()
        recorder.step = None
        found.append(sum(recorder.waits.values()))
    recorder.step = 1
    recorder.waits.clear()
    (value * 2).sum().isfinite().float().mul_(value.sum())
    torch.where(value > 0, value, 1.0)
    torch.full((), 3.0, device="cpu")
    assert not recorder.waits, recorder.waits
    out.write_text(json.dumps(found))
    os._exit(0)
