"""The nano model, trained twenty steps through interpreted kernels and through plain torch: the same losses."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("lumina.model")

#: The whole preset at its own learning rate; few tokens a step, as an interpreter can take, fewer supervised, and
#: those filled up with rows of weight zero to 4, not to whole tiles.
TRAIN = """
import json, torch
from lumina.config import load
from lumina.model import Transformer
from lumina.kernels import launch

torch.set_num_threads(1)
torch.manual_seed(7)
config = load("nano", {}, [])
model = Transformer(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
losses = []
with launch.planned_for(1):
    for step in range(20):
        length = 5 + step % 3
        ids, targets = torch.randint(0, config.vocab_size, (2, 1, length))
        positions = torch.cat((torch.arange(3), torch.arange(length - 3))).view(1, -1)
        boundaries = torch.tensor([0, 3, length], dtype=torch.int32)
        where, weights = torch.tensor([3, 0, 0, 0]), torch.tensor([1.0, 0.0, 0.0, 0.0])
        loss = model(ids, positions, boundaries, length, targets[0, where], weights, supervised_N=where)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
print(json.dumps(losses))
"""


#: Two sequences at the same positions share one row of angles; packed ones have their own.
ROTATE = """
import json, torch
from lumina.model import ops

torch.manual_seed(3)
q, k = torch.randn(2, 6, 4, 16), torch.randn(2, 6, 2, 16)
found = []
for positions in (torch.arange(6).view(1, 6), torch.tensor([[0, 1, 2, 0, 1, 2], [5, 6, 7, 8, 0, 1]])):
    for x in ops.rope(q, k, ops.Rotary.of(positions, 16, 10000.0)):
        found.append(x.flatten().tolist())
print(json.dumps(sum(found, [])))
"""


def run(script: str, path: str) -> list[float]:
    """The numbers a script prints in a process of its own, through one path of the model's door."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment | {"LUMINA_KERNELS": path}
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_the_door_rotates_alike_by_both_paths() -> None:
    assert run(ROTATE, "interpret") == pytest.approx(run(ROTATE, "torch"), abs=1e-6)


@pytest.mark.long
@pytest.mark.timeout(280)
def test_twenty_steps_by_both_paths() -> None:
    interpreted, plain = run(TRAIN, "interpret"), run(TRAIN, "torch")
    assert len(plain) == 20
    assert plain[-1] != plain[0]
    assert interpreted != plain, "two paths round differently: one was taken twice"
    assert max(abs(a - b) for a, b in zip(interpreted, plain, strict=True)) < 1e-3
