"""The decoder is transformers' LlamaForCausalLM to 1e-5 in float32, with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lumina.model import Transformer
from tests.model.tiny_models import make_model, pack

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one key head": {"num_kv_heads": 1},
    "no groups": {"num_kv_heads": 4},
    "other constants": {"rope_theta": 500000.0, "rms_norm_eps": 1e-3, "intermediate_size": 40},
}


def as_llama(model: Transformer) -> Any:
    """Llama with this model's weights: the fused projections taken apart."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.ffn_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            max_position_embeddings=c.seq_length,
            rms_norm_eps=c.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=c.tie_word_embeddings,
        )
    )
    weights = {"model.embed_tokens": model.embedding.weight, "model.norm": model.norm.weight}
    weights["lm_head"] = model.output.weight
    widths = [heads * c.head_dim for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
    for layer, block in enumerate(model.blocks):
        at = f"model.layers.{layer}."
        for name, piece in zip("qkv", block.attention.qkv.weight.split(widths), strict=True):
            weights[f"{at}self_attn.{name}_proj"] = piece
        gate, up = block.feed_forward.gate_up.weight.chunk(2)
        weights |= {
            f"{at}self_attn.o_proj": block.attention.out.weight,
            f"{at}mlp.gate_proj": gate,
            f"{at}mlp.up_proj": up,
            f"{at}mlp.down_proj": block.feed_forward.down.weight,
            f"{at}input_layernorm": block.attention_norm.weight,
            f"{at}post_attention_layernorm": block.feed_forward_norm.weight,
        }
    llama.load_state_dict({f"{name}.weight": weight.detach().clone() for name, weight in weights.items()})
    return llama.to(model.embedding.weight.dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits(shape: str, tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied, **SHAPES[shape])
    llama = as_llama(model)
    assert sum(p.numel() for p in llama.parameters()) == model.config.num_parameters()
    ids = torch.randint(61, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(ids, torch.arange(48).expand(2, -1)), llama(ids).logits
    assert theirs.std() > 0.3  # a flat distribution would prove nothing
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients(tied: bool) -> None:
    """With weight 1 on every position but the last, the loss is transformers' own, and so is every gradient."""
    model = make_model(tie_word_embeddings=tied)
    llama = as_llama(model)
    batch = pack([48])
    ones = torch.ones(1, 48)
    ones[0, -1] = 0.0
    loss = model(*batch[:5], ones) / 47
    theirs = llama(batch.ids, labels=batch.ids).loss
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=1e-6)
    loss.backward()
    theirs.backward()

    def gradient(name: str) -> Tensor:
        found = llama.get_parameter(f"{name}.weight").grad
        assert isinstance(found, Tensor)
        return found

    first, layer = model.blocks[0], "model.layers.0."
    qkv = torch.cat([gradient(f"{layer}self_attn.{name}_proj") for name in "qkv"])
    gate_up = torch.cat([gradient(f"{layer}mlp.{name}_proj") for name in ("gate", "up")])
    expected = {
        model.embedding.weight: gradient("model.embed_tokens"),
        first.attention.qkv.weight: qkv,
        first.feed_forward.gate_up.weight: gate_up,
        first.attention.out.weight: gradient(f"{layer}self_attn.o_proj"),
        first.feed_forward.down.weight: gradient(f"{layer}mlp.down_proj"),
        first.attention_norm.weight: gradient(f"{layer}input_layernorm"),
        model.norm.weight: gradient("model.norm"),
    }
    if not tied:
        expected[model.output.weight] = gradient("lm_head")
    for parameter, theirs_gradient in expected.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.to_dense(), theirs_gradient, rtol=1e-4, atol=1e-6)


def test_parameters_are_counted_exactly() -> None:
    for tied in (True, False):
        model = make_model(tie_word_embeddings=tied)
        assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters()
        assert (model.output.weight is model.embedding.weight) == tied
