"""overlap_comm: the same steps with it and without, and a host that does not wait for the device."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lumina.config import load
from lumina.config.deepspeed import largest_tensor, resolve

if TYPE_CHECKING:
    from tests.runs import Runs

CASES = [(stage, overlap) for stage in (1, 2) for overlap in (False, True)]


def _probe(rank: int, *, out: Path) -> None:
    """Three steps of two micro-batches under every case, each rank with batches of its own."""
    import torch

    from lumina.config import deepspeed as ds_json
    from lumina.model import Transformer
    from lumina.train.deepspeed import engine, startup
    from tests.train.tiny_engines import batch, make_config

    startup.init_process_group()
    found = []
    for stage, overlap in CASES:
        config = make_config("bf16", vocab_size=128, num_layers=6)
        document = ds_json.default_json(2, stage)
        document["zero_optimization"]["overlap_comm"] = overlap
        # Less than a layer: many buckets, so that both of the pair are filled again while the other is reduced.
        document["zero_optimization"]["reduce_bucket_size"] = 9000
        resolved = ds_json.resolve(config, 2, "cpu", bf16_supported=True, document=document)
        torch.manual_seed(0)
        made = engine.Engine(Transformer(config), resolved.config, resolved.json)
        made.set_lr(1e-2)
        steps = []
        for seed in range(3):
            loss = 0.0
            for number in range(2):
                mine = batch(8 * seed + 4 * rank + number)
                loss += float(made.accumulate(mine, 1 / 80, last=number == 1))
            norm, applied = made.step()
            steps.append([loss, float(norm), bool(applied)])
        weights = [float(p.detach().double().norm()) for p in made.model.parameters()]
        buckets = made.ds.optimizer.reduce_bucket_size
        found.append({"steps": steps, "weights": weights, "bucket": buckets})
        made.close()
    out.with_suffix(f".{rank}").write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)


@pytest.mark.timeout(900)
def test_overlap_changes_nothing(runs: Runs, tmp_path: Path) -> None:
    job = runs.start([], 2, patch=partial(_probe, out=tmp_path / "out"))
    assert job.wait() == [0, 0], job.stderr()[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"out.{rank}").read_text(encoding="utf-8"))
        reference, *others = found
        assert all(applied for _, _, applied in reference["steps"])
        for other in others:
            assert other["bucket"] < 12_000  # several to the model's 60,000 weights
            assert other["steps"] == [pytest.approx(step, rel=0.02) for step in reference["steps"]]
        for off, on in ((0, 1), (2, 3)):
            assert found[off]["steps"] == found[on]["steps"]
            assert found[off]["weights"] == found[on]["weights"]


def _order(rank: int, *, out: Path) -> None:
    """For every case: which stream waits for which, before the one that reduces is used each time."""
    from deepspeed.accelerator import get_accelerator

    from lumina.config import deepspeed as ds_json
    from lumina.model import Transformer
    from lumina.train.deepspeed import engine, startup
    from tests.train.host_waits import Recorder
    from tests.train.tiny_engines import batch, make_config

    Recorder().install()
    events: list[list[str]] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def synchronize(self) -> None:
            events.append(["host waits", self.name])

        def wait_stream(self, other: Stream) -> None:
            events.append(["waits", self.name, other.name])

        def wait_event(self, event: Any) -> None: ...

    kind: Any = type(get_accelerator())
    current = [Stream("main")]
    main = current[0]

    @contextmanager
    def entered(self: Any, stream: Stream) -> Iterator[None]:
        events.append(["enter", stream.name])
        current.append(stream)
        yield
        current.pop()

    kind.Stream, kind.stream = Stream, entered
    kind.current_stream = lambda self, index=None: current[-1]
    kind.default_stream = lambda self, index=None: main
    kind.synchronize = lambda self, index=None: events.append(["host waits", "device"])
    world, found = startup.init_process_group().world, {}
    for stage in (1, 2):
        config = make_config("bf16", vocab_size=128)
        document = ds_json.default_json(world, stage)
        document["zero_optimization"] |= {"overlap_comm": True, "reduce_bucket_size": 9000}
        resolved = ds_json.resolve(config, world, "cpu", bf16_supported=True, document=document)
        made = engine.Engine(Transformer(config), resolved.config, resolved.json)
        made.set_lr(1e-2)
        events.clear()
        for number in range(2):
            made.accumulate(batch(number), 1 / 80, last=number == 1)
        passes = list(events)
        made.step()
        found[str(stage)] = [passes, events[len(passes) :]]
        made.close()
    if rank == 0:
        out.write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)


@pytest.mark.parametrize("world", [1, 2])
def test_streams_wait_and_not_the_host(world: int, runs: Runs, tmp_path: Path) -> None:
    """The stream that reduces a bucket comes after the one that filled it, each time; and the update after both."""
    job = runs.start([], world, patch=partial(_order, out=tmp_path / "out"))
    assert job.wait() == [0] * world, job.stderr()[-3000:]
    for stage, (passes, update) in json.loads((tmp_path / "out").read_text(encoding="utf-8")).items():
        assert not [event for event in passes + update if event[0] == "host waits"]
        used, ordered = 0, False
        for event in passes:
            ordered = ordered or event == ["waits", "side", "main"]
            if event == ["enter", "side"]:  # twice for a bucket: to reduce it, and to take apart what came of it
                assert ordered or used % 2, f"stage {stage}: bucket {used // 2} may be reduced before it is filled"
                used, ordered = used + 1, False
        assert used > 4, "nothing was reduced beside the backward pass"
        last = len(passes) - 1 - passes[::-1].index(["enter", "side"])
        assert ["waits", "main", "side"] in passes[last:], f"stage {stage}: the update may overtake the reduction"


@pytest.mark.parametrize(("device", "world", "on"), [("cuda", 2, True), ("cuda", 1, None), ("cpu", 2, None)])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_is_on_for_several_gpus(device: str, world: int, on: bool | None, stage: int) -> None:
    document: dict[str, Any] = {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": stage}}
    made = resolve(load("debug"), world, device, bf16_supported=True, document=document).json
    assert made["zero_optimization"].get("overlap_comm") is on


@pytest.mark.parametrize("preset", ["debug", "8b"])
def test_a_bucket_holds_the_largest_tensor(preset: str) -> None:
    config = load(preset)
    zero = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}
    made = resolve(config, 8, "cuda", bf16_supported=True, document={"zero_optimization": zero})
    assert made.json["zero_optimization"]["reduce_bucket_size"] == largest_tensor(config)
    assert any("instead of 1000" in line for line in made.report)
    plain = {"zero_optimization": {**zero, "overlap_comm": False}}
    quiet = resolve(config, 8, "cuda", bf16_supported=True, document=plain)
    assert quiet.json["zero_optimization"]["reduce_bucket_size"] == 1000
    import torch

    from lumina.model import Transformer

    with torch.device("meta"):
        model = Transformer(config)
    assert largest_tensor(config) == max(parameter.numel() for parameter in model.parameters())
