"""Weight decay goes to matrices, and to nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lumina.model import Transformer
from lumina.train.deepspeed import parameter_groups
from lumina.train.deepspeed.optimizer import build_optimizer
from tests.train.tiny_engines import make_config


@pytest.mark.parametrize("tied", [True, False])
def test_groups(tied: bool) -> None:
    model = Transformer(make_config(tie_word_embeddings=tied))
    decayed, free = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    in_decayed, in_free = ([names[id(p)] for p in group["params"]] for group in (decayed, free))
    # Every parameter once, in the order of the model, a tied table among the embeddings.
    assert sorted(in_decayed + in_free) == sorted(names.values())
    order = list(names.values())
    assert in_decayed == sorted(in_decayed, key=order.index)
    assert in_free == sorted(in_free, key=order.index)
    assert all("norm" in name or name == "embedding.weight" for name in in_free)
    assert len(in_free) == 2 * model.config.num_layers + 2
    assert not any("norm" in name or "embedding" in name for name in in_decayed)
    assert ("output.weight" in in_decayed) == (not tied)


def test_decay_moves_matrices_only() -> None:
    """With gradients of zero an update is decay alone."""
    config = make_config(weight_decay=0.5)
    model = Transformer(config)
    optimizer = build_optimizer(model, config, {})
    assert isinstance(optimizer, torch.optim.AdamW)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = "norm" in name or name == "embedding.weight"
        torch.testing.assert_close(parameter.detach(), before[name] * (1.0 if kept else 0.95))


def test_settings_reach_adam() -> None:
    config = make_config(adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-6)
    optimizer = build_optimizer(Transformer(config), config, {})
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)
        assert group["lr"] == 0.0  # the loop sets it before every step


UPDATES = """
import sys, torch
from lumina.train.torch_private import AdamW
torch.manual_seed(3)
ours, theirs = ([torch.nn.Parameter(torch.randn(40, generator=torch.Generator().manual_seed(1)))] for _ in range(2))
groups = lambda parameters: [{"params": parameters, "weight_decay": 0.1}]
optimizer = AdamW(groups(ours), lr=1e-2, fused=True)
gradients = [torch.randn(40) for _ in range(5)]
for gradient in gradients:
    ours[0].grad = gradient.clone()
    optimizer.step()
assert "torch._dynamo" not in sys.modules
optimizer = torch.optim.AdamW(groups(theirs), lr=1e-2, fused=True)
for gradient in gradients:
    theirs[0].grad = gradient.clone()
    optimizer.step()
assert "torch._dynamo" in sys.modules  # or there would be nothing to avoid
assert torch.equal(ours[0], theirs[0])
"""


def test_torchs_updates_without_torchs_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", UPDATES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
