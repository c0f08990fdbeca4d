"""The launch term: counted against the operators that a layer really calls, and what it does to a prediction."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lumina.config import load
from lumina.model import ops, transformer
from lumina.plan.costs.devices import Cluster, find_device
from lumina.plan.costs.launches import BACKWARD, FORWARD, NORM, TILE, LaunchCost, host_seconds, layer_launches
from lumina.plan.costs.setup import Setup
from lumina.plan.costs.speed import predict


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("LUMINA_KERNELS", "triton")
    monkeypatch.setattr(ops, "_chosen", None)  # read anew, and afterwards what it was
    monkeypatch.setattr(transformer, "attention", lambda q, *rest: q)  # one launch, three backward: not counted


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        name = name.split(".")[0]
        if space == "lumina":
            self.launches += 2 if "norm" in name and "backward" in name else 1  # the weight's gradient
        elif name in ("mm", "addmm", "bmm"):
            self.launches += 1
        self.names[f"{space}::{name}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"family": "qwen3"}])
def test_a_layers_launches(triton_path: None, changes: dict[str, Any]) -> None:
    config = load("nano", changes)
    with FakeTensorMode():
        block = transformer.Block(config, 0)
        rotary = ops.Rotary.of(torch.arange(16)[None], config.head_dim, config.rope_theta)
        x = torch.randn(1, 16, config.hidden_size, requires_grad=True)
        residual = torch.randn(1, 16, config.hidden_size, requires_grad=True)
        with Counted() as forward:
            out = block(x, residual, rotary)
        with Counted() as backward:
            torch.autograd.backward(out, [torch.ones_like(o) for o in out])
    planned = layer_launches(config)
    assert forward.launches == planned[0] - 1, forward.names
    assert backward.launches == planned[1] - 3, backward.names
    more = len(config.norm_widths) - 2
    assert planned == (FORWARD + more * NORM[0], BACKWARD + more * NORM[1])


@pytest.mark.parametrize("changes", [{}, {"family": "qwen3"}])
def test_tiles_launches(triton_path: None, changes: dict[str, Any]) -> None:
    """Sixteen tokens in tiles of six: what lies in the feed-forward three times forward, three times backward after
    being made again; and what puts tiles together."""
    config = load("nano", changes)
    with FakeTensorMode():
        block = transformer.Block(config, 0)
        block.tile_tokens = 6
        rotary = ops.Rotary.of(torch.arange(16)[None], config.head_dim, config.rope_theta)
        x = torch.randn(1, 16, config.hidden_size, requires_grad=True)
        residual = torch.randn(1, 16, config.hidden_size, requires_grad=True)
        with Counted() as forward:
            out = block(x, residual, rotary)
        with Counted() as backward:
            torch.autograd.backward(out, [torch.ones_like(o) for o in out])
    planned = layer_launches(config, tiles=3)
    assert forward.names["aten::copy_"] == 3 * TILE[0]
    assert forward.launches == planned[0] - 1 - 3 * TILE[0], forward.names
    joined = sum(backward.names[f"aten::{name}"] for name in ("copy_", "add_", "clone", "_to_copy", "new_zeros"))
    joined -= backward.names["aten::new_empty_strided"]  # a leaf's gradient, copied to be laid out as the leaf is
    assert backward.launches + joined == planned[1] - 3, (backward.launches, planned, backward.names)


def test_small_tiles_wait_for_the_host() -> None:
    """A row of 65,536 tokens of the 1b preset: a thousand tiles a layer are longer queued than computed."""
    config, h100 = load("1b", {"seq_length": 1 << 16}), find_device("h100")
    found = {
        tile: predict(config, Setup(1, 1, 1, "bf16", checkpoint_every=1, mlp_tile=tile), Cluster(h100))
        for tile in (0, 8192, 64)
    }
    assert {tile: speed.host_bound for tile, speed in found.items()} == {0: False, 8192: False, 64: True}
    assert found[8192].host < 10 * found[0].host
    assert found[64].host > 50 * found[8192].host


def test_a_small_model_waits_for_the_host_and_a_large_one_does_not() -> None:
    h100 = find_device("h100")
    for preset, bound in (("debug", True), ("8b", False)):
        speed = predict(load(preset), Setup(2, 4, 1, "bf16"), Cluster(h100))
        assert speed.host_bound is bound
        assert speed.step == pytest.approx(
            max(speed.host, speed.products + speed.elementwise + speed.optimizer) + speed.exposed
        )
    # A host without cost leaves what the device does, and twice the host's time halves the speed of what it limits.
    setup, debug = Setup(2, 4, 1, "bf16"), load("debug")
    free = predict(debug, setup, Cluster(h100, launch_cost=LaunchCost(0.0, 0.0)))
    assert free.step == free.products + free.elementwise + free.optimizer
    usual, slow = (predict(debug, setup, Cluster(h100, launch_cost=LaunchCost(f * 1e-3, f * 1e-3))) for f in (1, 2))
    assert slow.step == pytest.approx(2 * usual.step)


def test_what_costs_launches() -> None:
    config, setup, host = load("debug"), Setup(2, 4, 1, "bf16"), LaunchCost(1e-3, 1e-3)
    seconds = lambda **changes: host_seconds(config, replace(setup, **changes), 0.0, 80e9, host)
    assert seconds() > 4 * 8 * 2e-3
    assert seconds(accumulation=8) == pytest.approx(2 * seconds(), rel=0.05)
    assert seconds(stage=2) > seconds(stage=1)
    assert host_seconds(config, setup, 1.0, 80e9, host) - seconds() == pytest.approx(4 * 8 * 1e-3)


def test_the_hosts_own_speed_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from lumina import cli

    found = []
    for extra in ([], ["--host-us", "5000", "6000"]):
        assert cli.main(["estimate-time", "--config", "debug", "--gpu", "h100", "--json", *extra]) == 0
        found.append(json.loads(capsys.readouterr().out)["runs"][0])
    assert found[1]["step"]["host"] > 5 * found[0]["step"]["host"]
    assert found[1]["tokens_per_second"] < found[0]["tokens_per_second"] / 5
    assert cli.main(["estimate-time", "--config", "debug", "--gpu", "h100", "--host-us", "5000", "6000"]) == 0
    assert "and the GPU waits for it" in capsys.readouterr().out
