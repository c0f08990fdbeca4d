"""The preference loss against the published formula, computed apart from this project's code in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lumina.config import ModelConfig
from lumina.model import PREFERENCE_FIGURES, Transformer
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
    pairs = torch.tensor([[1.25, 0.5, -30.0], [-2.0, 0.5, -20.0], [0.0, 0.0, 0.0]])
    return Given(ids, ids.roll(-1), mask, positions, bounds, pairs)


def pair(batch: Given, number: int) -> Given:
    """One pair alone."""
    edges = batch.bounds[2 * number : 2 * number + 3]
    part = slice(int(edges[0]), int(edges[2]))
    rows = (x[part] for x in (batch.ids, batch.targets, batch.mask, batch.positions))
    return Given(*rows, edges - edges[0], batch.pairs[number : number + 1])


def log_probabilities(model: Transformer, batch: Given) -> Tensor:
    """Of each pair's chosen and rejected answer (P, 2), from the logits."""
    logits = model(batch.ids[None], batch.positions[None], batch.bounds)[0]
    logps = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0] * batch.mask
    starts, ends = batch.bounds[:6].tolist(), batch.bounds[1:7].tolist()
    return torch.stack([logps[a:b].sum() for a, b in zip(starts, ends, strict=True)]).view(3, 2)


def published(model: Transformer, batch: Given) -> Tensor:
    """arXiv:2305.18290, equation 7, as TRL's loss_type "sigmoid" computes it: from the logits, with autograd."""
    answers = log_probabilities(model, batch)
    total = answers.new_zeros(())
    for (chosen, rejected), (reference, weight, _) in zip(answers, batch.pairs.tolist(), strict=True):
        total = total - weight * torch.nn.functional.logsigmoid(BETA * (chosen - rejected - reference))
    return total


def make(dtype: torch.dtype = torch.float64, **changes: Any) -> Transformer:
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "seq_length": 64, "init_std": 0.2}
    torch.manual_seed(0)
    return Transformer(ModelConfig(**shape, vocab_size=VOCABULARY, **changes)).to(dtype)  # type: ignore[arg-type]


def own(model: Transformer, batch: Given, beta: float | None = BETA) -> Tensor:
    supervised = batch.mask.nonzero()[:, 0]
    documents = torch.searchsorted(batch.bounds, supervised.int(), right=True) - 1
    inputs = batch.ids[None], batch.positions[None], batch.bounds, 20, batch.targets[supervised], batch.mask[supervised]
    options = {"supervised_N": supervised, "documents_N": documents, "pairs_P3": batch.pairs, "beta": beta}
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
    assert float(found[0]) == pytest.approx(float(expected), rel=tolerance)
    with torch.no_grad():
        assert own(model, given()).tolist() == found.tolist()
    (3 * found[0]).backward()  # type: ignore[no-untyped-call]
    (3 * expected).backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        gradient, expected_gradient = parameter.grad.to_dense().double(), wanted[name].grad.to_dense()
        assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) <= tolerance, name


def test_routers_losses_count_an_answer_by_half_its_pairs_weight() -> None:
    """Law 2: pairs end to end are each pair by itself, and as far as the routers' losses go two documents whose tokens
    weigh half of the pair's together. A document of no pair takes no part."""
    model, batch = make(family="mixtral", experts={"count": 4}).train(), given()

    def routers_part(score: Callable[[], Tensor]) -> list[Tensor]:
        found = []
        for coefficient in (0.7, 0.0):
            model.config.router_aux_loss_coef, model.config.router_z_loss_coef = coefficient, coefficient / 2
            grads = torch.autograd.grad(score(), list(model.parameters()), allow_unused=True)
            found.append([torch.zeros(()) if g is None else g.to_dense() for g in grads])
        return [a - b for a, b in zip(*found, strict=True)]

    together = routers_part(lambda: own(model, batch)[0])
    apart = [routers_part(lambda p=p: own(model, pair(batch, p))[0]) for p in (0, 1)]
    weights = torch.zeros(len(batch.ids))
    for start, end in itertools.pairwise(batch.bounds[:5].tolist()):
        weights[start : end - 1] = 0.25 / (end - 1 - start)
    inputs = batch.ids[None], batch.positions[None], batch.bounds, 20, batch.targets[None], weights[None]
    as_documents = routers_part(lambda: model(*inputs))
    assert max(float(g.norm()) for g in together) > 0.1
    for whole, first, second, documents in zip(together, *apart, as_documents, strict=True):
        torch.testing.assert_close(whole, first + second, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(whole, documents, rtol=1e-5, atol=1e-6)


def test_margins_are_what_the_loss_is_made_of() -> None:
    model, batch = make(), given()
    answers = own(model, batch, None)
    assert answers.shape == (3, 2)
    assert answers[2].tolist() == [0.0, 0.0]  # padding
    assert not answers.requires_grad
    assert answers[:2].numpy() == pytest.approx(log_probabilities(model, batch)[:2].detach().numpy(), rel=1e-10)
    # A model that is its own reference loses log 2 on each pair, and no reward is anything but 0.
    margins, weights = (answers[:, 0] - answers[:, 1]).float(), torch.tensor([0.5, 0.5, 0.0])
    same = batch._replace(pairs=torch.stack((margins, weights, answers[:, 0].float()), 1))
    loss, *figures = own(model, same).tolist()
    assert loss == pytest.approx(0.6931471805599453, rel=1e-6)
    assert [figures[PREFERENCE_FIGURES.index(f"rewards/{name}")] for name in ("chosen", "rejected", "margins")] == (
        pytest.approx([0.0] * 3, abs=1e-5)
    )


def test_figures_are_the_papers_rewards() -> None:
    """Weighted sums over the pairs of beta * (log p - reference log p) of both answers, as TRL logs them, apart from
    this code: a pair of weight 0 counts for nothing."""
    model, batch = make(), given()
    with torch.no_grad():
        chosen, rejected = log_probabilities(model, batch).unbind(1)
        margin, weight, reference = batch.pairs.double().unbind(1)
        rewards = BETA * (chosen - reference), BETA * (rejected - (reference - margin))
        expected = {
            "rewards/chosen": (weight * rewards[0]).sum(),
            "rewards/rejected": (weight * rewards[1]).sum(),
            "rewards/accuracies": (weight * (rewards[0] > rewards[1])).sum(),
            "rewards/margins": (weight * (rewards[0] - rewards[1])).sum(),
        }
        found = dict(zip(PREFERENCE_FIGURES, own(model, batch)[1:].tolist(), strict=True))
    assert found == {name: pytest.approx(float(value), rel=1e-10) for name, value in expected.items()}
    unknown = batch._replace(pairs=batch.pairs.clone().index_fill_(1, torch.tensor([2]), torch.nan))
    known = own(model, unknown)
    assert torch.isfinite(known).tolist() == [True, False, False, True, True]
    assert float(known[0].detach()) == float(own(model, batch)[0].detach())
