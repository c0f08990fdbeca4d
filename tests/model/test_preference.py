"""The preference loss against the published formula, computed apart from this project's code in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lumina.config import ModelConfig
from lumina.model import Transformer
from lumina.model import loss as fused

VOCABULARY, BETA = 61, 0.3


class Given(NamedTuple):
    ids: Tensor
    targets: Tensor
    mask: Tensor
    positions: Tensor
    bounds: Tensor
    pairs: Tensor


def given() -> Given:
    """Three pairs with prompts of their own, one of them padding, and a last document of no pair."""
    draw = torch.Generator().manual_seed(4)
    lengths = [9, 14, 20, 11, 1, 1, 7]
    ids = torch.randint(VOCABULARY, (sum(lengths),), generator=draw)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    mask = torch.zeros(len(ids))
    for document, start in enumerate(bounds[:4].tolist()):
        mask[start + 3 : start + lengths[document] - 1] = 1.0
    positions = torch.cat([torch.arange(length) for length in lengths])
    pairs = torch.tensor([[1.25, 0.5], [-2.0, 0.5], [0.0, 0.0]])
    return Given(ids, ids.roll(-1), mask, positions, bounds, pairs)


def published(model: Transformer, batch: Given) -> Tensor:
    """arXiv:2305.18290, equation 7, as TRL's loss_type "sigmoid" computes it: from the logits, with autograd."""
    logits = model(batch.ids[None], batch.positions[None], batch.bounds)[0]
    logps = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0] * batch.mask
    total = logits.new_zeros(())
    for pair, (reference, weight) in enumerate(batch.pairs.tolist()):
        (a, b), (c, d) = (batch.bounds[i : i + 2].tolist() for i in (2 * pair, 2 * pair + 1))
        ratio = logps[a:b].sum() - logps[c:d].sum() - reference
        total = total - weight * torch.nn.functional.logsigmoid(BETA * ratio)
    return total


def make(dtype: torch.dtype = torch.float64, **changes: Any) -> Transformer:
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "seq_length": 64, "init_std": 0.2}
    torch.manual_seed(0)
    return Transformer(ModelConfig(**shape, vocab_size=VOCABULARY, **changes)).to(dtype)  # type: ignore[arg-type]


def own(model: Transformer, batch: Given, beta: float | None = BETA) -> Tensor:
    supervised = batch.mask.nonzero()[:, 0]
    documents = torch.searchsorted(batch.bounds, supervised.int(), right=True) - 1
    inputs = batch.ids[None], batch.positions[None], batch.bounds, 20, batch.targets[supervised], batch.mask[supervised]
    options = {"supervised_N": supervised, "documents_N": documents, "pairs_P2": batch.pairs, "beta": beta}
    out: Tensor = model(*inputs, **options)
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1 << 28, 3000])
def test_loss_and_gradients(
    dtype: torch.dtype, tolerance: float, tied: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "CHUNK_BYTES", chunk)
    model, reference = make(dtype, tie_word_embeddings=tied), make(tie_word_embeddings=tied)
    found, expected = own(model, given()), published(reference, given())
    assert float(found) == pytest.approx(float(expected), rel=tolerance)
    with torch.no_grad():
        assert float(own(model, given())) == float(found.detach())
    (3 * found).backward()  # type: ignore[no-untyped-call]
    (3 * expected).backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        gradient, expected_gradient = parameter.grad.to_dense().double(), wanted[name].grad.to_dense()
        assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) <= tolerance, name


def test_margins_are_what_the_loss_is_made_of() -> None:
    model, batch = make(), given()
    margins = own(model, batch, None)
    assert margins.shape == (3,)
    assert float(margins[2]) == 0.0  # padding
    assert not margins.requires_grad
    # A model that is its own reference loses log 2 on each pair.
    same = batch._replace(pairs=torch.stack((margins.float(), torch.tensor([0.5, 0.5, 0.0])), 1))
    assert float(own(model, same)) == pytest.approx(0.6931471805599453, rel=1e-6)
