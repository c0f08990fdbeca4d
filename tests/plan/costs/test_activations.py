"""The activation model against what autograd keeps for the real model, built of fake tensors: no memory, no GPU.

The Triton path's operators run as on a GPU, by their setup functions; attention stands for the variable-length kernels,
which keep q, k, v, their result and a float32 log-sum per head and position (flash_attn_varlen_func's own backward).
"""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lumina.config import load
from lumina.model import Transformer, ops, transformer
from lumina.plan.costs.memory import activation_bytes_per_token
from lumina.plan.costs.setup import Setup


class VariableLengthAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:
        return None, None, None


@pytest.fixture
def gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the GPU path's operators are Triton's")
    monkeypatch.setenv("LUMINA_KERNELS", "triton")
    monkeypatch.setattr(ops, "_chosen", None)
    monkeypatch.setattr(
        transformer, "attention", lambda q, k, v, *rest: VariableLengthAttention.apply(q[0], k[0], v[0])[None]
    )


CASES = [(name, {}) for name in ("nano", "debug", "small", "medium", "large", "1b", "8b")]
CASES += [("small", {"family": "qwen2"}), ("small", {"family": "qwen3", "head_size": 96})]


@pytest.mark.parametrize(("preset", "changes"), CASES)
@pytest.mark.parametrize("checkpoint_every", [0, 1, 3])
def test_activations(
    gpu_path: None, monkeypatch: pytest.MonkeyPatch, preset: str, changes: dict[str, Any], checkpoint_every: int
) -> None:
    from deepspeed.runtime.activation_checkpointing import checkpointing

    config = load(preset, changes)
    tokens = config.seq_length
    kept: dict[int, tuple[int, torch.Tensor]] = {}  # storage -> bytes, and a reference that keeps the storage alive

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    real = checkpointing.checkpoint

    def recording(function: Any, *inputs: torch.Tensor) -> Any:
        for tensor in inputs:  # DeepSpeed keeps a recomputed layer's inputs itself, past autograd's hooks
            keep(tensor)
        return real(function, *inputs)

    monkeypatch.setattr(checkpointing, "checkpoint", recording)
    with FakeTensorMode():
        model = Transformer(config).train()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        model.checkpoint_every = checkpoint_every
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        ids = torch.zeros(1, tokens, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(ids, ids)
    measured = sum(size for size, _ in kept.values())
    setup = Setup(1, 1, 1, "bf16", checkpoint_every=checkpoint_every)
    # Beside the layers: the last norm's input and result, the ids, and the rotary tables (which a recomputed layer
    # finds in its closure, unseen by the hooks).
    rest = 4 * config.hidden_size + 4 + 8 + (4 * config.head_dim if checkpoint_every != 1 else 0)
    predicted = tokens * (activation_bytes_per_token(config, setup) + rest)
    assert predicted == pytest.approx(measured, rel=0.01)
