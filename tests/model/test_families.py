"""Biases, norms of heads, heads of any width, slowed rotary angles: gradients, packing and half precision.

That the logits are transformers' own is shown with imported models in tests/infer/hf/test_importing.py.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina.config import ModelConfig, RopeScaling, Structure
from lumina.model import Transformer, ops
from lumina.train.deepspeed import parameter_groups
from tests.model.tiny_models import SHAPE, make_model, pack

LLAMA_3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"family": "qwen3", "head_size": 20},
    "llama3": {"rope_scaling": LLAMA_3, "head_size": 6, "rope_theta": 500.0},
}


def loss_and_gradients(model: Transformer) -> tuple[float, dict[str, torch.Tensor]]:
    batch = pack([9, 1, 14])
    loss = model(*batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = (g.to_dense() if g.is_sparse else g for g in torch.autograd.grad(loss, parameters))
    return loss.item(), dict(zip(names, gradients, strict=True))


def test_the_guide_to_a_new_family_names_the_structure() -> None:
    """docs/models.md: every field that a family's file may set, and none that there is not."""
    guide = (Path(__file__).parents[2] / "docs/models.md").read_text()
    listed = guide.partition("1. where the structure differs:")[2].partition("(lumina.config's Structure)")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == {each.name for each in fields(Structure)}


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_and_counts(family: str) -> None:
    model = make_model(**FAMILIES[family])
    batch = pack([9, 1, 14])
    torch.testing.assert_close(model(*batch), sum(model(*part) for part in batch.documents()))
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters()
    free = {id(p) for p in parameter_groups(model, 0.1)[1]["params"]}
    assert {n for n, p in model.named_parameters() if id(p) in free} == {
        n for n, p in model.named_parameters() if p.ndim == 1 or n == "embedding.weight"
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_errs_no_more_than_plain_torch(
    family: str, compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and every gradient, norms of heads over strided views included, against float64."""
    model = make_model(dtype=torch.bfloat16, **FAMILIES[family])
    exact = Transformer(model.config).double()
    exact.load_state_dict(model.state_dict())
    loss, gradients = loss_and_gradients(model)
    _, wide = loss_and_gradients(exact)
    monkeypatch.setattr(ops, "_choice", lambda: "torch")
    plain_loss, plain = loss_and_gradients(model)
    assert loss == pytest.approx(plain_loss, rel=0.02)
    for name, gradient in gradients.items():
        error = (gradient.double() - wide[name]).norm()
        assert error <= 2 * (plain[name].double() - wide[name]).norm() + 1e-6, name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_transformers_own(family: str) -> None:
    import transformers

    ours = make_model(seed=4, **FAMILIES[family])
    c = ours.config
    name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[c.family]
    scaling = {} if c.rope_scaling is None else c.rope_scaling.model_dump()
    rope = {"rope_type": scaling.pop("type", "default"), "rope_theta": c.rope_theta, **scaling}
    rope.setdefault("original_max_position_embeddings", None)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.ffn_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=64,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={key: value for key, value in rope.items() if value is not None},
        tie_word_embeddings=c.tie_word_embeddings,
    )
    theirs = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        theirs.lm_head.weight.copy_(ours.output.weight)
        theirs.model.embed_tokens.weight.copy_(ours.embedding.weight)
        theirs.model.norm.weight.copy_(ours.norm.weight)
        for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
            own, attention = block.attention, layer.self_attn
            layer.input_layernorm.weight.copy_(block.attention_norm.weight)
            layer.post_attention_layernorm.weight.copy_(block.feed_forward_norm.weight)
            attention.o_proj.weight.copy_(own.out.weight)
            layer.mlp.down_proj.weight.copy_(block.feed_forward.down.weight)
            gate, up = block.feed_forward.gate_up.weight.chunk(2)
            layer.mlp.gate_proj.weight.copy_(gate)
            layer.mlp.up_proj.weight.copy_(up)
            rows = [heads * c.head_dim for heads in own.heads]
            for kind in ("weight", "bias") if c.structure.qkv_bias else ("weight",):
                for part, piece in zip("qkv", getattr(own.qkv, kind).split(rows), strict=True):
                    getattr(getattr(attention, f"{part}_proj"), kind).copy_(piece)
            if c.structure.qk_norm:
                attention.q_norm.weight.copy_(own.q_norm.weight)
                attention.k_norm.weight.copy_(own.k_norm.weight)
    ids, targets = torch.randint(0, c.vocab_size, (2, 1, 20))
    loss = ours(ids, torch.arange(20)[None], targets_N=targets, weights_N=torch.ones(1, 20))
    expected = torch.nn.functional.cross_entropy(theirs(ids).logits[0], targets[0], reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    block, layer = ours.blocks[0], theirs.model.layers[0]
    pairs = [(block.attention_norm.weight, layer.input_layernorm.weight)]
    if c.structure.qkv_bias:
        biases = [getattr(layer.self_attn, f"{part}_proj").bias.grad for part in "qkv"]
        torch.testing.assert_close(block.attention.qkv.bias.grad, torch.cat(biases), rtol=1e-4, atol=1e-5)
    if c.structure.qk_norm:
        pairs += [(block.attention.q_norm.weight, layer.self_attn.q_norm.weight)]
        pairs += [(block.attention.k_norm.weight, layer.self_attn.k_norm.weight)]
    for own_weight, their_weight in pairs:
        torch.testing.assert_close(own_weight.grad, their_weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("type", ["linear", "llama3"])
def test_slowed_angles_are_transformers_bits(type: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    ours = {**LLAMA_3, "original_max_position_embeddings": 8192} if type == "llama3" else {"type": type, "factor": 4.0}
    theirs = {"rope_type": type, "rope_theta": 500000.0, **{k: v for k, v in ours.items() if k != "type"}}
    theirs.setdefault("original_max_position_embeddings", 8192)
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=theirs)
    positions = torch.tensor([[0, 1, 4095, 100_000]])
    table = ops.Rotary.of(positions, 128, 500000.0, RopeScaling.model_validate(ours))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 4, 1), positions)
    assert torch.equal(table.cos_BSh, cos[..., :64])
    assert torch.equal(table.sin_BSh, sin[..., :64])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_size": 7}, "head_size is 7: rotary positions need an even head size"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "llama3 needs original_max_position_embeddings"),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0}}, "yarn needs original_max_position_embeddings"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 8.0}},
            "should be 'linear', 'llama3', 'yarn' or 'dynamic'",
        ),
        ({"attention_softcap": 50.0}, "the family llama has no attention_softcap; those that have: gemma2"),
        ({"family": "qwen3", "sliding_layers": [1]}, "sliding_layers needs sliding_window"),
        (
            {"family": "qwen3", "sliding_window": 4, "sliding_layers": [2]},
            "sliding_layers .2. are not layers from 0",
        ),
        ({"family": "qwen3", "sliding_window": 4, "sliding_layers": []}, "leave sliding_window out"),
        ({"family": "phi3", "partial_rotary_factor": 0.4}, "partial_rotary_factor rotates 3 of 8, not an even number"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "greater than or equal to 1"),
        (
            {"family": "qwen"},
            r"no such model family: qwen. Did you mean qwen\d\? There are: .*llama, mistral",
        ),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ModelConfig(**(SHAPE | changes))  # type: ignore[arg-type]
    assert ModelConfig(**(SHAPE | {"hidden_size": 33, "head_size": 8})).head_dim == 8  # type: ignore[arg-type]
