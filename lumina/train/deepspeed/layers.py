"""Per-layer norms of gradient, weights and update, the same under every ZeRO stage.

Each rank sums the squares of what it owns (fragments.py), and one reduction of three numbers a layer makes the
norms. The gradient is read between the last backward pass and the update, in whatever place DeepSpeed keeps it then.
The update is not the difference of two copies, which would cost another float32 copy of the weights, but what AdamW
computes from the moments that it has just written (arXiv:1711.05101, without the decay of the weights).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lumina.train.deepspeed.engine import Engine
from lumina.train.deepspeed.fragments import Fragment, moments, owned_fragments, step_count
from lumina.train.deepspeed.surface import Wrapper
from lumina.train.health import LayerFigures

_CHUNK = 4 * 2**20  # elements worked on at once: bounds the scratch memory to a few tens of MB


def layer_of(name: str) -> str:
    """`blocks.3.attention.qkv.weight` belongs to `blocks.3`; other parameters are layers of their own."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]


def _gradient(engine: Engine, parameters: dict[str, Any], piece: Fragment) -> Tensor | None:
    """This rank's part of the reduced gradient, in DeepSpeed's own scale and type."""
    from deepspeed.utils import safe_get_local_grad

    parameter = parameters[piece.name]
    if engine.wrapper is Wrapper.ZERO_3:
        whole: Tensor = safe_get_local_grad(parameter)
        return whole.view(-1)[: piece.numel]
    if engine.wrapper in (Wrapper.ZERO_1_2, Wrapper.BF16):
        # DeepSpeed's public safe_get_full_grad would put the whole gradient together from every rank, one by one.
        found: Tensor = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
        return found.narrow(0, piece.start, piece.numel) if found.numel() == parameter.numel() else found
    if parameter.grad is None:
        return None
    return parameter.grad.detach().view(-1)[piece.start : piece.start + piece.numel]  # type: ignore[no-any-return]


def _squares(values: Tensor) -> Tensor:
    """The sum of squares, float64; without a float64 copy of the values."""
    norms = [torch.linalg.vector_norm(chunk, dtype=torch.float32).double() for chunk in torch.split(values, _CHUNK)]
    return torch.stack(norms).square().sum()


def _updates(engine: Engine, piece: Fragment) -> Iterator[Tensor]:
    """The update of a fragment's weights in chunks, without weight decay."""
    group = engine.optimizer.param_groups[0]
    (beta1, beta2), step = group["betas"], step_count(engine)
    state = moments(engine, piece)
    if not state:
        return
    firsts, seconds = (torch.split(state[key], _CHUNK) for key in ("exp_avg", "exp_avg_sq"))
    for first, second in zip(firsts, seconds, strict=True):
        deviation = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        yield (first / deviation).mul_(group["lr"] / (1 - beta1**step))


class LayerStats:
    """Two calls around an update: `before` reads the gradients, `after` returns the figures. Both are collective."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pieces = owned_fragments(engine)
        trained = [name for name, parameter in engine.model.named_parameters() if parameter.requires_grad]
        self._names = list(dict.fromkeys(map(layer_of, trained)))
        self._index = {name: index for index, name in enumerate(self._names)}
        self._gradients = self._zeros()

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self._names), dtype=torch.float64, device=self._engine.device)

    @torch.no_grad()
    def before(self) -> None:
        parameters = dict(self._engine.model.named_parameters())
        self._gradients = self._zeros()
        for piece in self._pieces:
            found = _gradient(self._engine, parameters, piece)
            if found is not None:
                self._gradients[self._index[layer_of(piece.name)]] += _squares(found)
        self._gradients /= self._engine.gradient_scale() ** 2

    @torch.no_grad()
    def after(self) -> dict[str, LayerFigures]:
        weights, updates = self._zeros(), self._zeros()
        for piece in self._pieces:
            index = self._index[layer_of(piece.name)]
            weights[index] += _squares(piece.view(piece.owner))
            for chunk in _updates(self._engine, piece):
                updates[index] += _squares(chunk)
        sums = torch.stack((self._gradients, weights, updates))
        dist.all_reduce(sums)
        norms = sums.sqrt().T.tolist()
        return {name: LayerFigures(*figures) for name, figures in zip(self._names, norms, strict=True)}
