"""The nano model, trained twenty steps through interpreted kernels and through plain torch: the same losses."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("lumina.model")

#: Nano's widths and layers, with a vocabulary and rows that the interpreter gets through in seconds.
TRAIN = """
import json, torch
from lumina.config import load
from lumina.model import Transformer
from lumina.kernels import launch

torch.set_num_threads(1)
torch.manual_seed(7)
config = load("nano", {}, [])
config.vocab_size = 300
model = Transformer(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
with launch.planned_for(4):
    for step in range(20):
        length = 13 + step % 3
        ids, targets = torch.randint(0, 300, (2, 1, length))
        positions = torch.cat((torch.arange(5), torch.arange(length - 5))).view(1, -1)
        boundaries = torch.tensor([0, 5, length], dtype=torch.int32)
        weights = (torch.arange(length) % 4 > 0).float().view(1, -1)
        loss = model(ids, positions, boundaries, length, targets, weights / weights.sum())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
print(json.dumps(losses))
"""


def losses(path: str) -> list[float]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", TRAIN], capture_output=True, text=True, env=environment | {"LUMINA_KERNELS": path}
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.timeout(280)
def test_twenty_steps_by_both_paths() -> None:
    interpreted, plain = losses("interpret"), losses("torch")
    assert len(plain) == 20
    assert plain[-1] != plain[0]
    assert max(abs(a - b) for a, b in zip(interpreted, plain, strict=True)) < 1e-3
