"""Losses and figures of the routers against sums written out, token by token, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lumina.config import ModelConfig
from lumina.model import Transformer
from lumina.model.routing import ExpertBalance, expert_balance
from tests.model.tiny_models import pack

CONFIG = ModelConfig(
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    seq_length=64,
    vocab_size=61,
    family="qwen3_moe",
    experts={"count": 8, "per_token": 3, "size": 16, "dense_layers": [1]},  # type: ignore[arg-type]
    init_std=0.2,
)
EXPERTS, CHOSEN = 8, 3


def noted_logits(model: Transformer) -> list[Tensor]:
    """Each layer's router logits of the passes to come."""
    found: list[Tensor] = []
    for block in model.blocks:
        if hasattr(block.feed_forward, "router"):
            block.feed_forward.router.register_forward_hook(
                lambda module, args, out: found.append(out.logits_TE.detach())
            )
    return found


def test_sums_written_out() -> None:
    torch.manual_seed(0)
    model = Transformer(CONFIG.model_copy(update={"router_aux_loss_coef": 0.0})).double().train()
    logits = noted_logits(model)
    first, second, padding = 9, 14, 8
    batch = pack([first, second, padding])
    batch.weights[0, -padding:] = 0.0
    model(*batch)
    weights = [float(batch.weights[0, :first].sum()), float(batch.weights[0, first : first + second].sum())]
    expected_loss, counts, entropies = 0.0, torch.zeros(2, EXPERTS), []
    for weight, start, end in zip(weights, (0, first), (first, first + second), strict=True):
        shares, chances, rows = torch.zeros(EXPERTS).double(), torch.zeros(EXPERTS).double(), 2 * (end - start)
        for layer in range(2):
            for token in range(start, end):
                p = logits[layer][token].softmax(-1)
                chances += p / rows
                entropies.append(float(-(p * p.log()).sum()))
                for expert in p.argsort(descending=True)[:CHOSEN].tolist():
                    shares[expert] += 1 / rows
                    counts[layer, expert] += 1
        expected_loss += weight * EXPERTS * float(shares @ chances) / sum(weights)
    found = model.take_routing_counts()
    assert found is not None
    figures = ExpertBalance(*expert_balance(found, CONFIG).tolist())
    assert figures.loss == pytest.approx(expected_loss, rel=1e-6)
    assert figures.entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-6)
    assert figures.load == pytest.approx(float((counts.amax(1) / counts.mean(1)).max()))
    assert figures.idle == float((counts == 0).double().mean())
    assert model.take_routing_counts() is None


def test_a_step_without_a_supervised_document_has_no_figures() -> None:
    """Not even a share of idle experts, which would be all of them."""
    model, batch = Transformer(CONFIG).train(), pack([9, 5])
    model(*batch._replace(weights=torch.zeros_like(batch.weights)))
    found = model.take_routing_counts()
    assert found is not None
    assert expert_balance(found, CONFIG).isnan().all()


def test_counts_of_micro_batches_add_up_to_those_of_the_whole() -> None:
    torch.manual_seed(0)
    model = Transformer(CONFIG).train()
    batch = pack([9, 1, 14, 5])
    model(*batch)
    whole = model.take_routing_counts()
    for part in batch.documents():
        model(*part)
    torch.testing.assert_close(model.take_routing_counts(), whole, rtol=1e-6, atol=1e-6)
    model.eval()(*batch)
    assert model.take_routing_counts() is None  # an evaluation is no step


def test_z_loss_is_the_mean_square_of_the_log_sum() -> None:
    """Its gradient with respect to a shift of all logits of a layer's router, by brute force."""
    torch.manual_seed(0)
    model = Transformer(CONFIG.model_copy(update={"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.5})).double()
    plain = Transformer(CONFIG.model_copy(update={"router_aux_loss_coef": 0.0})).double()
    plain.load_state_dict(model.state_dict())
    logits = noted_logits(model)
    batch = pack([12])
    with_loss, without = (
        torch.autograd.grad(one.train()(*batch), one.get_parameter("blocks.2.feed_forward.router.weight"))[0]
        for one in (model, plain)
    )
    x: list[Tensor] = []
    model.blocks[2].feed_forward_norm.register_forward_hook(lambda module, args, out: x.append(out[0][0].detach()))
    model(*batch)
    last = logits[1]
    # d/dW of mean over 2 layers x 12 tokens of logsumexp^2, times 0.5 and the document's weight
    slope = 2 * last.logsumexp(-1, keepdim=True) * last.softmax(-1) / 24
    expected = 0.5 * float(batch.weights.sum()) * slope.T @ x[0]
    torch.testing.assert_close(with_loss - without, expected, rtol=1e-5, atol=1e-7)
