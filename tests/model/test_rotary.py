"""Rotary angles of contexts beyond 2^17 tokens against arithmetic of 60 digits."""

from __future__ import annotations

import mpmath
import pytest
import torch
from torch import Tensor

from lumina.config import ModelConfig, RopeScaling
from lumina.model import Decoder, KVCache, Transformer, ops

FAR = (2**17 + 1, 2**20 - 1, 4_000_001, 16_000_001, 2**24 + 1, 2**25 + 3)
WIDTH, THETA, TRAINED = 128, 500_000.0, 8192
SCALINGS = {
    "none": None,
    "linear": {"type": "linear", "factor": 3.0},
    "llama3": {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "yarn": {"type": "yarn", "factor": 48.0, "original_max_position_embeddings": TRAINED},
}


def frequencies(kind: str) -> list[mpmath.mpf]:
    """By the papers' formulas (arXiv:2306.15595, arXiv:2309.00071 section 3.2, and Llama 3.1's)."""
    plain = [mpmath.mpf(THETA) ** (-mpmath.mpf(2 * i) / WIDTH) for i in range(WIDTH // 2)]
    scaling = SCALINGS[kind]
    if scaling is None:
        return plain
    factor = mpmath.mpf(scaling["factor"])  # type: ignore[arg-type]
    if kind == "linear":
        return [f / factor for f in plain]
    turns = [TRAINED * f / (2 * mpmath.pi) for f in plain]
    if kind == "llama3":
        kept = [min(1, max(0, (turn - 1) / (4 - 1))) for turn in turns]
    else:
        at = [WIDTH * mpmath.log(TRAINED / (n * 2 * mpmath.pi)) / (2 * mpmath.log(THETA)) for n in (32, 1)]
        first, last = mpmath.floor(at[0]), mpmath.ceil(at[1])
        kept = [1 - min(1, max(0, (i - first) / (last - first))) for i in range(WIDTH // 2)]
    return [(1 - share) * f / factor + share * f for share, f in zip(kept, plain, strict=True)]


@pytest.mark.parametrize("kind", SCALINGS)
def test_angles_of_far_positions(kind: str) -> None:
    given = SCALINGS[kind]
    scaling = None if given is None else RopeScaling.model_validate(given)
    table = ops.Rotary.of(torch.tensor([FAR]), WIDTH, THETA, scaling, wide=True)
    assert table.cos_BSh.dtype is torch.float32
    with mpmath.workdps(60):
        factor = mpmath.mpf("0.1") * mpmath.log(48) + 1 if kind == "yarn" else 1
        for ours_BSh, function in ((table.cos_BSh, mpmath.cos), (table.sin_BSh, mpmath.sin)):
            exact = [[float(factor * function(at * f)) for f in frequencies(kind)] for at in FAR]
            torch.testing.assert_close(
                ours_BSh[0].double(), torch.tensor(exact, dtype=torch.float64), rtol=0, atol=2e-7
            )


def test_tables_are_made_of_several_pieces_of_positions() -> None:
    """Two rows of a number of tokens that is not a multiple of a piece: each token has the angles that it has alone."""
    positions = torch.arange(16_000_000, 16_040_002).view(2, -1)
    table = ops.Rotary.of(positions, 4, 100.0, None, wide=True)
    for row, column in ((0, 0), (0, 16_384), (1, 0), (1, 12_767), (1, -1)):
        alone = ops.Rotary.of(positions[row : row + 1, column].view(1, 1), 4, 100.0, None, wide=True)
        assert torch.equal(table.cos_BSh[row, column], alone.cos_BSh[0, 0])
        assert torch.equal(table.sin_BSh[row, column], alone.sin_BSh[0, 0])


def tiny(seq_length: int) -> Transformer:
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 300}
    return Transformer(ModelConfig(**shape, seq_length=seq_length, init_std=0.3, rope_theta=THETA)).eval()


@torch.inference_mode()
def logits(model: Transformer, first: int) -> Tensor:
    positions = torch.arange(first, first + 9)[None]
    found: Tensor = model(torch.arange(9)[None] + 7, positions)
    return found


@pytest.mark.parametrize("first", [2**20 - 3, 16_000_001, 2**25 + 1])
def test_a_model_of_long_context_sees_distances_alone(first: int) -> None:
    """Attention is a function of how far tokens are apart, wherever they stand."""
    model = tiny(2**26)
    torch.testing.assert_close(logits(model, first), logits(model, 0), rtol=0, atol=1e-4)
    assert (logits(model, 0)[0, 1:] - logits(model, 0)[0, :1]).abs().max() > 0.1


def test_contexts_up_to_2_to_the_17_keep_float32s_bits() -> None:
    """Those are transformers' own (test_families.py), whatever the position."""
    far = 2**17 - 9
    for seq_length in (64, 2**17):
        assert not any(rope.wide for rope in tiny(seq_length).ropes)
    short, long = logits(tiny(2**17), far), logits(tiny(2**17 + 1), far)
    assert not torch.equal(short, long)
    near = ModelConfig(
        **{"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "seq_length": 2**18},
        **{"family": "gemma3_text", "sliding_window": 4, "sliding_layers": [0], "sliding_rope_theta": 1000.0},
    )
    assert all(layer.rope is not None and layer.rope.wide for layer in near.layers)


@torch.inference_mode()
def test_the_decoding_step_stores_keys_of_the_models_angles() -> None:
    """One token at the far end of a cache whose other places are empty, by the compiled step where there is a compiler
    and by the model."""
    model, slot = tiny(2**18), 2**18 - 1
    kept = []
    for compiled in (True, False):
        cache = KVCache(model.config, 1, slot + 1, model.embedding.weight)
        cache.lengths[0] = slot
        ids = torch.tensor([[7]])
        if compiled:
            Decoder(model, cache, torch.zeros(300, dtype=torch.bool)).logits(ids, [0])
        else:
            model(ids, cache.extend([0], [1], decode=True), cache=cache)
        kept.append(cache.keys[:, 0, 0, slot].clone())
    assert kept[0].abs().max() > 0.1
    torch.testing.assert_close(*kept, rtol=0, atol=1e-5)
