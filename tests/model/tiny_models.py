"""Decoders of a few thousand parameters, packed batches for them, and how numbers are judged.

Half-precision results are held against float64: their largest error may be twice that of a plain torch implementation
in the same type, plus a tiny absolute allowance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lumina.config import ModelConfig
from lumina.model import Transformer

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "seq_length": 64, "vocab_size": 61}
TINY = 1e-6

Operation = Callable[..., Tensor | tuple[Tensor, ...]]


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Transformer:
    """Weights large enough that the distributions are far from flat, and norm weights that are not all one."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**({"init_std": 0.2} | SHAPE | changes)))  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype)


class Packed(NamedTuple):
    """Documents end to end, in the order of Transformer.forward's arguments."""

    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    targets: Tensor
    weights: Tensor

    def documents(self) -> list[Packed]:
        """Each document on its own, without boundaries inside."""
        found = []
        for start, end in zip(self.cu_seqlens[:-1].tolist(), self.cu_seqlens[1:].tolist(), strict=True):
            part = slice(start, end)
            edges = torch.tensor([0, end - start], dtype=torch.int32)
            rows = (self.ids, self.positions, self.targets, self.weights)
            ids, positions, targets, weights = (x[:, part] for x in rows)
            found.append(Packed(ids, positions, edges, end - start, targets, weights))
        return found


def pack(lengths: Sequence[int], vocabulary: int = 61, supervised: float = 0.5, seed: int = 0) -> Packed:
    """Random documents of the given lengths; about `supervised` of the positions have a weight, and not all the same
    one. The last position of a document has none."""
    draw = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(vocabulary, (1, total), generator=draw)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    edges = torch.tensor([0, *lengths]).cumsum(0)
    weights = (torch.rand(1, total, generator=draw) < supervised) * (0.5 + torch.rand(1, total, generator=draw))
    weights[0, edges[1:] - 1] = 0.0
    return Packed(ids, positions, edges.int(), max(lengths), ids.roll(-1, 1), weights.float())


def run(operation: Operation, arguments: Sequence[Tensor], wide: bool = False) -> list[Tensor]:
    """Outputs of an operation, then the gradients of all floating arguments that require one, for upstream gradients
    that are drawn once and the same in every type. In float64 if `wide`."""
    given = [
        (a.detach().double() if wide and a.is_floating_point() else a.detach()).requires_grad_(a.requires_grad)
        for a in arguments
    ]
    outputs = operation(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    draw = torch.Generator().manual_seed(99)
    upstream = [torch.randn(o.shape, generator=draw).to(arguments[0].dtype).to(o.dtype) for o in outputs]
    wanted = [a for a in given if a.requires_grad]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, wanted, upstream)]


def check_errors(ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """err(ours) <= 2 err(plain) + TINY for every output and gradient, every element finite."""
    for index, (o, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert o.shape == e.shape, index
        assert o.dtype == p.dtype, index
        assert torch.isfinite(o).all(), f"result {index}: an element is missing or not finite"
        error, allowed = (o.double() - e).abs().max().item(), (p.double() - e).abs().max().item()
        assert error <= 2 * allowed + TINY, f"result {index}: error {error:.3g}, plain torch makes {allowed:.3g}"
