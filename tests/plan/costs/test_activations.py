"""The activation model against what autograd keeps for the real model, built of fake tensors: no memory, no GPU.

The Triton path's operators run as on a GPU, by their setup functions; attention stands for the variable-length kernels,
which keep q, k, v, their result and a float32 log-sum per head and position (flash_attn_varlen_func's own backward),
and whose backward pass allocates a float32 gradient and a sum per head, and gradients of keys and values for each query
head (flash_api.cpp, mha_varlen_bwd).
Of ranks that share rows one is there, whose exchanges bring nothing.
"""

import weakref
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lumina.config import Config, load
from lumina.model import HostCopies, SequenceGroup, Transformer, ops, transformer
from lumina.plan.costs import activations
from lumina.plan.costs.setup import Setup


class VariableLengthAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        workspace = [torch.empty(q.shape, dtype=torch.float32), torch.empty(q.shape[:2], dtype=torch.float32)]
        if k.shape != q.shape:
            workspace += [torch.empty_like(q) for _ in range(2)]
        return torch.empty(q.shape, dtype=q.dtype), torch.empty(k.shape, dtype=k.dtype), torch.empty_like(v)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, docs: Any, scoring: Any) -> torch.Tensor:
    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = VariableLengthAttention.apply(q[0], k[0], v[0])  # type: ignore[no-untyped-call]
        return out[None]

    return kernel(q, k, v) if docs.sequence is None else docs.sequence.attend(kernel, q, k, v)


@pytest.fixture
def gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the GPU path's operators are Triton's")
    monkeypatch.setenv("LUMINA_KERNELS", "triton")
    monkeypatch.setattr(ops, "_chosen", None)
    monkeypatch.setattr(transformer, "attention", attend)
    monkeypatch.setattr(torch.distributed, "all_to_all_single", lambda found, given, group: None)


def made(config: Config, checkpoint_every: int, ranks: int) -> Transformer:
    """The model of one of so many ranks that share rows, in bfloat16."""
    model = Transformer(config).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.checkpoint_every = checkpoint_every
    if ranks > 1:
        model.share_rows(SequenceGroup(0, ranks, None))  # type: ignore[arg-type]
    return model


CASES = [(name, {}) for name in ("nano", "debug", "small", "medium", "large", "1b", "8b")]
CASES += [("small", {"family": "qwen2"}), ("small", {"family": "qwen3", "head_size": 96})]


@pytest.mark.parametrize(("preset", "changes"), CASES)
@pytest.mark.parametrize("checkpoint_every", [0, 1, 3])
def test_activations(
    gpu_path: None, monkeypatch: pytest.MonkeyPatch, preset: str, changes: dict[str, Any], checkpoint_every: int
) -> None:
    expect_what_autograd_keeps(monkeypatch, load(preset, changes), checkpoint_every, 1)


@pytest.mark.parametrize(
    ("preset", "changes", "checkpoint_every", "ranks"),
    [("nano", {}, 0, 2), ("nano", {}, 0, 4), ("small", {"family": "qwen3"}, 0, 4), ("8b", {}, 3, 32)],
)
def test_activations_of_ranks_that_share_rows(
    gpu_path: None,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    changes: dict[str, Any],
    checkpoint_every: int,
    ranks: int,
) -> None:
    """With as many key/value heads as ranks, and with fewer."""
    expect_what_autograd_keeps(monkeypatch, load(preset, changes), checkpoint_every, ranks)


def expect_what_autograd_keeps(
    monkeypatch: pytest.MonkeyPatch, config: Config, checkpoint_every: int, ranks: int
) -> None:
    from deepspeed.runtime.activation_checkpointing import checkpointing

    tokens = config.seq_length // ranks
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
        model = made(config, checkpoint_every, ranks)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        ids = torch.zeros(1, tokens, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(ids, ids, torch.tensor([0, config.seq_length]), bounds=(0, config.seq_length))
    measured = sum(size for size, _ in kept.values())
    setup = Setup(1, 1, ranks, "bf16", checkpoint_every=checkpoint_every, sequence_parallel=ranks)
    # Beside the layers: the last norm's input and result, the ids, and the rotary tables (which a recomputed layer
    # finds in its closure, unseen by the hooks).
    rest = 4 * config.hidden_size + 4 + 8 + (4 * config.head_dim if checkpoint_every != 1 else 0)
    predicted = setup.tokens(config) * (activations.activation_bytes_per_token(config, setup) + rest)
    assert predicted == pytest.approx(measured, rel=0.01)


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most of it since `peak` was last set."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._bytes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._bytes and storage._cdata not in self._known:
                    self._bytes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return found

    def _freed(self, key: int) -> None:
        self.now -= self._bytes.pop(key)


NARROW = {"intermediate_size": 64}  # attention's part is the highest then
HALF, MANY = {"mlp_tile_tokens": 1 << 19}, {"mlp_tile_tokens": 1 << 16}
GROUPS = {"num_heads": 8, "num_kv_heads": 4, "attention_head_groups": 4}
FEW = GROUPS | {"mlp_tile_tokens": 1 << 14}
OFFLOADED = {"activation_offloading": True, "gradient_checkpointing": True}
PASSES = [
    ({}, 0, 1), ({}, 1, 1), ({}, 1, 2), ({}, 1, 4), (NARROW, 1, 1), (NARROW, 1, 2), (NARROW, 1, 4), ({}, 0, 2),
    ({"family": "qwen3"}, 1, 2), (HALF, 1, 1), (MANY, 1, 1), (MANY, 1, 2), (MANY, 0, 1), (OFFLOADED, 1, 1),
    (NARROW | GROUPS, 1, 1), (FEW, 1, 1), (FEW, 1, 2), (FEW, 0, 1), (FEW | {"family": "qwen3"}, 1, 1),
    (FEW | OFFLOADED | {"num_heads": 16, "num_kv_heads": 8}, 1, 4),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "checkpoint_every", "ranks"), PASSES)
def test_backward_passes(gpu_path: None, changes: dict[str, Any], checkpoint_every: int, ranks: int) -> None:
    """What is alive at the highest moment of the last layer's backward pass, and from the first layer's recomputation
    on: of so many tokens that the weights' own gradients do not count."""
    config = load("nano", {"seq_length": 1 << 20, "num_layers": 3, "tie_word_embeddings": False, **changes})
    setup = Setup(
        1,
        1,
        ranks,
        "bf16",
        checkpoint_every=checkpoint_every,
        sequence_parallel=ranks,
        mlp_tile=config.mlp_tile_tokens or 0,
        head_groups=config.attention_head_groups,
        activation_offloading=config.activation_offloading,
    )
    tokens = setup.tokens(config)
    with FakeTensorMode():
        model = made(config, checkpoint_every, ranks)
        model.tile_feed_forward(setup.mlp_tile)
        model.group_heads(setup.head_groups)
        model.host_copies = HostCopies() if setup.activation_offloading else None
        ids, edges = torch.zeros(1, tokens, dtype=torch.long), torch.tensor([0, config.seq_length])
        gradient = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16)
        alive, last = Alive([*model.parameters(), ids, edges, gradient]), 0

        def recomputed(*rest: Any) -> None:
            nonlocal last
            last, alive.peak = max(last, alive.peak), 0

        with alive:
            out = model.trunk(ids, ids, edges, None, None, (0, config.seq_length))
            alive.peak = 0
            if checkpoint_every:
                model.blocks[0].register_forward_pre_hook(recomputed)
            out.backward(gradient)
    rest = 2 * config.hidden_size + 4 * config.head_dim  # the trunk's result, which this test holds, and rotary tables
    kept = activations.activation_bytes_per_token(config, setup)
    if setup.activation_offloading:  # on a CPU the host's copies are here too, and none is on its way beside the work
        kept += activations.host_bytes(config, setup) / tokens - 2 * config.hidden_size
    predicted = tokens * (kept + activations.last_layers_backward(config, setup) + rest)
    near = 0.03 if setup.mlp_tile else 0.01  # what lives from one tile into the next is not counted in full
    assert predicted == pytest.approx(max(last, alive.peak) if not checkpoint_every else last, rel=near)
    if checkpoint_every:
        predicted = tokens * (activations.first_layers_backward(config, setup) + rest)
        predicted += activations.host_bytes(config, setup)
        assert predicted == pytest.approx(alive.peak, rel=near)
