"""The launch term: counted against the operators that a layer really calls, and what it does to a prediction."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lumina.config import Config, load
from lumina.model import HostCopies, ops, transformer
from lumina.model.attention import Documents
from lumina.model.memory.recompute import recomputed
from lumina.plan.costs.devices import Cluster, find_device
from lumina.plan.costs.launches import BACKWARD, FORWARD, RECOMPUTED, TILE, LaunchCost, host_seconds, layer_launches
from lumina.plan.costs.setup import Setup
from lumina.plan.costs.speed import predict
from lumina.plan.costs.workload import memory_bytes_per_token


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("LUMINA_KERNELS", "triton")
    monkeypatch.setattr(ops, "_chosen", None)  # read anew, and afterwards what it was
    monkeypatch.setattr(transformer, "attention", lambda q, *rest, **more: q)  # one launch, three backward: not counted


# What launches nothing.
_VIEWS = set(
    """alias as_strided detach device empty empty_like empty_strided expand new_empty new_empty_strided permute
    promote_types select slice split split_with_sizes squeeze t transpose unsqueeze view _reshape_alias
    _unsafe_view""".split()  # noqa: SIM905
)
TOKENS = 4096


class Counted(TorchDispatchMode):
    """Launches, and the bytes that element-wise ones read and write; without those of this test: the gradients that it
    begins with, those of keys and values, which what is in attention's place leaves out, joined with its queries', and
    the copy of a leaf's gradient that is laid out in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.bytes = 0
        self._gradient: Any = None

    @property
    def launches(self) -> int:
        return sum(self.names.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        ours = name in ("ones_like", "zeros") or (name == "cat" and len(args[0]) == 3)
        if name == "new_empty_strided":
            self._gradient = found
        if name in _VIEWS or ours or (name == "copy_" and args[0] is self._gradient):
            return found
        self.names[name] += 2 if "norm_backward" in name else 1  # the weight's gradient
        tensors = {id(x): x for x in tree_leaves((args, kwargs, found)) if isinstance(x, torch.Tensor)}.values()
        if func.namespace == "lumina":  # whose kernels take whole rows: what is expanded is made first
            self.names["expanded"] += sum(map(_expanded, tensors))
        if name not in ("mm", "addmm", "new_zeros"):
            self.bytes += sum(x.nbytes * (1 + _expanded(x)) for x in tensors)
            self.bytes += args[0].nbytes if name == "add_" else 0  # read and written
        return found


def _expanded(x: torch.Tensor) -> bool:
    return x.dim() > 0 and x.stride(-1) == 0


FAMILIES: list[dict[str, Any]] = [
    {},
    {"family": "qwen2"},
    {"family": "qwen3"},
    {"family": "gemma2", "attention_softcap": None},
    {"family": "gemma3_text"},
    {"family": "olmo2"},
    {"family": "granite", "residual_multiplier": 0.25},
]
named = pytest.mark.parametrize("changes", FAMILIES, ids=[str(one.get("family", "llama")) for one in FAMILIES])


def counted(
    config: Config, tile: int = 0, copies: HostCopies | None = None, groups: int = 1
) -> tuple[Counted, Counted]:
    """What a layer launches forward and backward, in bfloat16, without attention. copies: of a recomputed layer."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            block = transformer.Block(config, 0)
            block.tile_tokens, block.attention.groups = tile, groups
            rotary = ops.Rotary.of(torch.arange(TOKENS)[None], config.head_dim, config.rope_theta)
            x, residual = (torch.randn(1, TOKENS, config.hidden_size, requires_grad=True) for _ in range(2))
            with Counted() as forward:
                rest = residual, rotary, Documents(None, None, TOKENS)
                out = block(x, *rest) if copies is None else recomputed(block, copies, x, *rest)
            with Counted() as backward:
                torch.autograd.backward(out, [torch.ones_like(o) for o in out])
    finally:
        torch.set_default_dtype(usual)
    return forward, backward


@named
def test_a_layers_launches(triton_path: None, changes: dict[str, Any]) -> None:
    config = load("nano", changes)
    forward, backward = counted(config)
    planned = layer_launches(config)
    assert forward.launches == planned[0] - 1, forward.names
    assert backward.launches == planned[1] - 3, backward.names
    if not changes:
        assert planned == (FORWARD, BACKWARD)


@named
def test_tiles_launches(triton_path: None, changes: dict[str, Any]) -> None:
    """Three tiles: what lies in the feed-forward three times forward, three times backward after being made again; what
    puts tiles together; and what a recomputed layer leaves to the tiles."""
    config = load("nano", changes)
    forward, backward = counted(config, TOKENS // 3 + 1)
    planned = layer_launches(config, tiles=3)
    assert forward.names["copy_"] == 3 * TILE[0]
    assert forward.launches == planned[0] - 1, forward.names
    assert backward.launches == planned[1] - 3, backward.names


@pytest.mark.parametrize("changes", [{}, {"family": "gemma3_text"}], ids=["llama", "gemma3_text"])
@pytest.mark.parametrize("groups", [2, 4])
def test_groups_of_heads(triton_path: None, changes: dict[str, Any], groups: int) -> None:
    """Without attention's own, and without its result's copy, which what is in its place does not keep; bytes too."""
    config = load("nano", {"num_heads": 8, "num_kv_heads": 4, "seq_length": TOKENS, "num_layers": 1} | changes)
    forward, backward = counted(config, groups=groups)
    planned = layer_launches(config, groups=groups)
    assert forward.launches == planned[0] - groups, forward.names
    assert backward.launches == planned[1] - 4 * groups, backward.names
    setup = Setup(1, 1, 1, "bf16", supervised=0.0, head_groups=groups)
    copied = 4 * config.hidden_size
    assert memory_bytes_per_token(config, setup) == pytest.approx(
        (forward.bytes + backward.bytes) / TOKENS + copied, rel=0.04
    )


@pytest.mark.parametrize("tiles", [0, 3])
@pytest.mark.parametrize("changes", [{}, {"family": "gemma2", "attention_softcap": None}], ids=["llama", "gemma2"])
def test_a_recomputed_layers_launches(triton_path: None, changes: dict[str, Any], tiles: int) -> None:
    """Its input is on the host meanwhile. Tiles leave the feed-forward out of what is computed again."""
    config = load("nano", changes)
    found = sum(each.launches for each in counted(config, tiles and TOKENS // tiles + 1, HostCopies()))
    planned = sum(layer_launches(config, 1.0, tiles=tiles, offloaded=True))
    assert found == planned - 1 - 1 - 3
    assert planned - sum(layer_launches(config, 1.0, tiles=tiles)) == 2


@named
@pytest.mark.parametrize("tile", [0, 1024])
def test_bytes_of_element_wise_kernels(triton_path: None, changes: dict[str, Any], tile: int) -> None:
    """Counted beside a layer's weights, whose norms and sums over tokens are small."""
    config = load("nano", {"seq_length": TOKENS, "num_layers": 1} | changes)
    setup = Setup(1, 1, 1, "bf16", supervised=0.0, mlp_tile=tile)
    found = sum(each.bytes for each in counted(config, tile))
    assert memory_bytes_per_token(config, setup) == pytest.approx(found / TOKENS, rel=0.04)


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
    again = host_seconds(config, setup, 1.0, 80e9, host) - seconds()
    assert again == pytest.approx(4 * 8 * 1e-3 * (FORWARD - 1 + RECOMPUTED) / FORWARD)  # the values are copied once


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
