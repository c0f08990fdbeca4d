"""Adapters over the fused projections; tests/infer/hf/test_peft.py holds them to peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lumina.config import LoraConfig, ModelConfig, load
from lumina.model import Transformer, lora

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 12,  # heads that do not fill the hidden width: every matrix has its own shape
    "seq_length": 64,
    "vocab_size": 61,
    "init_std": 0.2,
}


def adapted(settings: LoraConfig, family: str = "qwen2") -> Transformer:
    """A model whose adapters have been trained: B is not zero."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE, family=family))  # type: ignore[arg-type]
    lora.attach(model, settings)
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def loss(model: Transformer, length: int = 24) -> torch.Tensor:
    ids = torch.arange(length)[None] * 7 % 61
    out: torch.Tensor = model(ids, torch.arange(length)[None], None, None, ids.roll(-1), torch.ones(1, length))
    return out


SOME = LoraConfig(lora_rank=4, lora_alpha=6.0, lora_targets=["q_proj", "v_proj", "up_proj"])
ALL = LoraConfig(lora_rank=3)


def test_training_begins_at_the_base_and_moves_adapters_alone() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE))
    before, names = loss(model), [name for name, _ in model.named_parameters()]
    lora.attach(model, ALL)
    assert torch.equal(loss(model), before)
    loss(model).backward()  # type: ignore[no-untyped-call]
    parameters = dict(model.named_parameters())
    trained = {name: tuple(p.shape) for name, p in parameters.items() if p.requires_grad}
    assert trained == lora.shapes(model.config, ALL)
    assert len(trained) == 2 * 7 * 2
    assert sorted(parameters.keys() - trained.keys()) == sorted(names), "the weights under adapters keep their names"
    for name, parameter in parameters.items():
        assert (parameter.grad is not None) == (name in trained), name


@pytest.mark.parametrize("settings", [SOME, ALL], ids=["some", "all"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_merged_is_the_same_function(settings: LoraConfig, family: str) -> None:
    model = adapted(settings, family).double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    plain = Transformer(model.config).double()
    moved = 0
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            gain = lora.gain(name, model.config, settings, weights.__getitem__)
            moved += gain is not None
            parameter.copy_(weights[name] if gain is None else weights[name] + gain)
    assert moved == 2 * (2 if settings is SOME else 4)  # fused matrices that any of the targets is part of
    torch.testing.assert_close(loss(plain), loss(model).detach(), rtol=1e-6, atol=0)
    without = Transformer(model.config).double()
    without.load_state_dict({name: weights[name] for name in without.state_dict() if name in weights}, strict=False)
    assert abs(loss(without).item() / loss(model).item() - 1) > 1e-3, "adapters that do nothing prove nothing"


def test_recomputed_layers_give_adapters_their_gradients() -> None:
    """Nothing that enters the first block has a gradient, and activation checkpointing must not stop there."""
    gradients = []
    for every in (0, 1):
        model = adapted(ALL)
        model.checkpoint_every = every
        loss(model).backward()  # type: ignore[no-untyped-call]
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_dropout_is_of_the_adapters_inputs_and_in_training_alone() -> None:
    model = adapted(LoraConfig(lora_rank=3, lora_dropout=0.5))
    torch.manual_seed(1)
    first, second = loss(model), loss(model)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(loss(model), first)
    assert torch.equal(loss(model.eval()), loss(adapted(ALL)))


def test_adapters_beside_experts() -> None:
    """On the attention's projections; experts and routers stay as they are."""
    shape: dict[str, Any] = {"family": "mixtral", "experts": {"count": 4}, "train_data": ["a"]}
    config = load("nano", shape | {"lora_rank": 4, "lora_targets": ["q_proj", "v_proj"]})
    model = Transformer(config)
    lora.attach(model, config)
    ids = torch.randint(0, 61, (1, 9))
    model.train()(ids, torch.arange(9)[None], targets_N=ids, weights_N=torch.ones(1, 9)).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == set(lora.shapes(config, config)) == {n for n, p in model.named_parameters() if p.requires_grad}
