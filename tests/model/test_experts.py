"""Mixtures of experts against transformers, brute force and float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lumina.config import Config, ModelConfig, load
from lumina.model import KVCache, Transformer, experts
from tests.model.expert_models import MODELS, SHAPE, make_pair, their_weights
from tests.model.tiny_models import pack

TINY: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "seq_length": 64}
MIXTRAL: dict[str, Any] = TINY | {"vocab_size": 61, "family": "mixtral", "experts": {"count": 4}, "init_std": 0.2}


def loss_and_gradients(model: Transformer, *batch: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(*batch, **options)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = (g.to_dense() if g.is_sparse else g for g in torch.autograd.grad(loss, parameters))
    return loss.detach(), dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_transformers_own(name: str) -> None:
    ours, theirs = make_pair(name, initializer_range=0.3)
    ids = torch.randint(0, 61, (2, 40))
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        own = ours.eval()(ids, torch.arange(40).expand(2, -1))
    assert expected.abs().max() > 3
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in ours.parameters()) == ours.config.num_parameters()


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_are_transformers_own(name: str, coefficient: float) -> None:
    """One document a step, where the two definitions of the load-balancing loss are one; a third of it is supervised.
    The loss that we return is the cross-entropy alone."""
    ours, theirs = make_pair(name, router_aux_loss_coef=coefficient, output_router_logits=bool(coefficient))
    ours.train()
    theirs.train()
    # An epsilon above rounding: transformers' gradients of logits that were not chosen are rounding, ours are 0.
    settings = {"lr": 3e-3, "weight_decay": 0.1, "eps": 1e-5}
    optimizers = [torch.optim.AdamW(model.parameters(), **settings) for model in (ours, theirs)]
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        length = int(torch.randint(6, 40, (), generator=draw))
        ids = torch.randint(0, 61, (1, length), generator=draw)
        labels = torch.where(torch.rand(1, length, generator=draw) < 0.3, ids, -100)
        labels[0, -1] = ids[0, -1]
        weights = torch.zeros(1, length)
        weights[:, :-1] = labels[:, 1:] != -100
        loss = ours(ids, torch.arange(length)[None], targets_N=ids.roll(-1, 1), weights_N=weights / weights.sum())
        expected = theirs(ids, labels=labels)
        balance = expected.aux_loss * coefficient if coefficient else 0.0
        torch.testing.assert_close(loss, expected.loss - balance, rtol=1e-4, atol=1e-4)
        for optimizer, minimised in zip(optimizers, (loss, expected.loss), strict=True):
            optimizer.zero_grad()
            minimised.backward()
            optimizer.step()
    for (which, own), other in zip(ours.named_parameters(), their_weights(ours, theirs.state_dict()), strict=True):
        torch.testing.assert_close(own.data, other.view_as(own), rtol=1e-4, atol=1e-4, msg=which)


@pytest.mark.parametrize("name", MODELS)
def test_packing_changes_no_gradient(name: str) -> None:
    """Law 2, the routers' losses included: the gradient of documents end to end, padding among them, is the sum of
    each one's own."""
    ours, _ = make_pair(name, router_aux_loss_coef=0.7)
    ours.config.router_z_loss_coef = 0.3
    ours.double().train()
    batch = pack([9, 1, 14, 8])
    batch.weights[0, -8:] = 0.0  # as padding
    loss, gradients = loss_and_gradients(ours, *batch)
    parts = [loss_and_gradients(ours, *part) for part in batch.documents()[:3]]
    torch.testing.assert_close(loss, sum(part[0] for part in parts))
    for which, gradient in gradients.items():
        apart = sum(part[1][which] for part in parts)
        assert (gradient - apart).norm() <= 1e-6 * apart.norm(), which
    ours.config.router_aux_loss_coef = ours.config.router_z_loss_coef = 0.0
    plain = loss_and_gradients(ours, *batch)[1]
    router = next(which for which in gradients if "router" in which)
    assert (plain[router] - gradients[router]).norm() > 0.01 * plain[router].norm()


def test_decoding_is_recomputing() -> None:
    """Two sequences of unequal lengths in one cache, prefilled and then token by token."""
    for name in MODELS:
        ours, _ = make_pair(name)
        ours.eval()
        rows = [torch.randint(0, 61, (length,)) for length in (11, 5)]
        cache = KVCache(ours.config, 2, 32, ours.norm.weight)
        with torch.no_grad():
            positions = cache.extend([0, 1], [7, 1])
            logits = [ours(torch.cat((rows[0][:7], rows[1][:1]))[None], positions, cache=cache)[:, 0]]
            for step in range(4):
                positions = cache.extend([0, 1], [1, 1], decode=True)
                ids = torch.stack((rows[0][7 + step], rows[1][1 + step]))[:, None]
                logits.append(ours(ids, positions, cache=cache)[:, 0])
            for row, ids in enumerate(rows):
                whole = ours(ids[None], torch.arange(len(ids))[None])[0, -5:]
                torch.testing.assert_close(torch.stack(logits)[:, row], whole, rtol=1e-5, atol=1e-5)


# --- Grouped products ---


def by_hand(x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
    return torch.cat([x[start:end] @ weight[e].T for e, (start, end) in enumerate(pairwise([0, *ends]))])


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("ends", [[3, 3, 7, 12], [0, 0, 0, 12], [12, 12, 12, 12]])
def test_grouped_products(ends: list[int], at_once: bool) -> None:
    """Expert by expert, and by torch's grouped product, which a CPU has too; experts without a token have a gradient
    of zeros."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(12, 16, generator=draw), torch.randn(4, 8, 16, generator=draw)
    x.requires_grad_()
    weight.requires_grad_()
    ends_E = torch.tensor(ends, dtype=torch.int32)
    own: Tensor = experts._GroupedProduct.apply(x, weight, ends_E, at_once)
    expected = by_hand(x, weight, ends)
    upstream = torch.randn(own.shape, generator=draw)
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(own, (x, weight), upstream),
        torch.autograd.grad(expected, (x, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("card", "hip", "fused"),
    [
        ((9, 0), None, True),
        ((10, 0), None, True),
        ((8, 0), None, False),
        ((8, 9), None, False),
        ((12, 0), None, False),
        ((9, 4), "7.0", False),
    ],
)
def test_one_launch_where_torch_has_a_kernel(
    card: tuple[int, int], hip: str | None, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other GPUs torch's grouped product asks the device where each group ends, which no CUDA graph can hold."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: card)
    monkeypatch.setattr(torch.version, "hip", hip)
    with FakeTensorMode():

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="cuda")

        assert experts.in_one_launch(empty(12, 16), empty(4, 8, 16)) == fused
        assert not experts.in_one_launch(empty(12, 16), empty(4, 8, 16, dtype=torch.float32))
        assert not experts.in_one_launch(empty(12, 12), empty(4, 8, 12))


def test_an_expert_without_a_token_takes_part() -> None:
    model = Transformer(ModelConfig(**MIXTRAL)).train()
    router = model.get_parameter("blocks.0.feed_forward.router.weight")
    with torch.no_grad():
        router.zero_()  # so that all tokens go to the same experts
    _, gradients = loss_and_gradients(model, *pack([9]))
    assert gradients["blocks.0.feed_forward.gate_up.weight"].shape == (4, 2 * model.config.ffn_size, 32)
    assert sum(bool(g.any()) for g in gradients["blocks.0.feed_forward.down.weight"]) == 2


@pytest.mark.long
def test_compiled_blocks_compute_the_same() -> None:
    model = Transformer(ModelConfig(**MIXTRAL)).train()
    batch = pack([9, 1, 14])
    loss, gradients = loss_and_gradients(model, *batch)
    model.compile_blocks(backend="eager")
    again, compiled = loss_and_gradients(model, *batch)
    torch.testing.assert_close(again, loss)
    for which, gradient in gradients.items():
        torch.testing.assert_close(compiled[which], gradient, msg=which)


# --- Settings ---


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"family": "llama"}, "family llama has no experts"),
        ({"experts": None}, "family mixtral needs experts"),
        ({"experts": {"count": 0}}, "experts.count"),
        ({"experts": {"count": 4, "per_token": 5}}, "5 per token of only 4"),
        ({"experts": {"count": 4, "size": 8}}, "size is intermediate_size in family mixtral"),
        ({"experts": {"count": 4, "dense_layers": [0]}}, "family mixtral has no dense_layers"),
        ({"experts": {"count": 4, "norm_topk_prob": False}}, "norm_topk_prob is always true in family mixtral"),
        ({"family": "qwen3_moe", "experts": {"count": 4, "dense_layers": [2]}}, "not ascending layers of 0 to 1"),
        ({"family": "qwen3_moe", "experts": {"count": 4, "dense_layers": [0, 1]}}, "every layer is a dense one"),
        ({"family": "olmoe", "experts": {"count": 4}, "head_size": 4}, "head_size .* is hidden_size / num_heads"),
        ({"experts": {"count": 4, "number": 1}}, "Extra inputs"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ModelConfig(**(MIXTRAL | changes))
    assert ModelConfig(**MIXTRAL).expert_layers == 2


def test_experts_get_no_adapters() -> None:
    shape: dict[str, Any] = {"family": "mixtral", "experts": {"count": 4}, "train_data": ["a"]}
    values = load("nano", shape | {"lora_rank": 4, "lora_targets": ["q_proj", "o_proj"]}).values()
    with pytest.raises(ValueError, match=r"experts get no adapters \(up_proj\); set lora_targets to \[q_proj, k_proj"):
        Config.create(values | {"lora_targets": ["q_proj", "up_proj"]}, set())


def test_active_parameters() -> None:
    ours, theirs = make_pair("qwen3_moe")
    idle = (
        sum(p.numel() for n, p in theirs.named_parameters() if ".experts." in n)
        * (8 - SHAPE["num_experts_per_tok"])
        // 8
    )
    assert ours.config.num_parameters(active=True) == ours.config.num_parameters() - idle
