"""Low-rank adapters (LoRA, arXiv:2106.09685) over the decoder's fused projections.

An adapter belongs to one of the projections that transformers knows, so that the adapters are what peft computes:
W x + scale * B A dropout(x). Our fused matrices are several of those laid one on top of the other (qkv = q, k, v and
gate_up = gate, up), each with an adapter of its own and none shared: the fused output gains their outputs side by side.

Shape suffixes: I inputs, O outputs of a projection, R rank; B, S as in transformer.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.config import Config, LoraConfig, ModelConfig, UserError
from lumina.model.families import family_of
from lumina.model.fused import RowSlice, projections
from lumina.model.layers.linear import Linear
from lumina.model.transformer import Transformer


def shapes(config: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """Name and shape of every adapter matrix, in the model's order."""
    inputs = {
        "attention.qkv": config.hidden_size,
        "attention.out": config.num_heads * config.head_dim,
        "feed_forward.gate_up": config.hidden_size,
        "feed_forward.down": config.ffn_size,
    }
    found = {}
    for layer in range(config.num_layers):
        for place, parts in projections(config).items():
            for part in parts:
                if part.name in lora.lora_targets:
                    name = f"blocks.{layer}.{place}.adapters.{part.name}"
                    found[f"{name}.a"] = (lora.lora_rank, inputs[place])
                    found[f"{name}.b"] = (part.rows, lora.lora_rank)
    return found


class Adapter(nn.Module):
    """scale * B A dropout(x). A is drawn, B begins at zero, so that training begins at the base model."""

    def __init__(self, inputs: int, outputs: int, lora: LoraConfig) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(lora.lora_rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, lora.lora_rank))
        self.scale, self.dropout = lora.lora_scale, lora.lora_dropout
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as peft draws it

    def forward(self, x_BSI: Tensor) -> Tensor:
        x_BSI = F.dropout(x_BSI, self.dropout, self.training) if self.dropout else x_BSI
        return F.linear(F.linear(x_BSI, self.a), self.b) * self.scale

    def of_rows(self, x_BSI: Tensor, rows: slice) -> Tensor:
        """These of its outputs, without dropout."""
        return F.linear(F.linear(x_BSI, self.a), self.b[rows]) * self.scale


class AdaptedLinear(Linear):
    """A linear layer whose own weights stay as they are, with an adapter for each projection that has one. Adapters are
    modules because ZeRO-3 gathers a weight around its owner's forward."""

    def __init__(self, base: nn.Linear, parts: list[RowSlice], lora: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.parts = parts
        targets = [part for part in parts if part.name in lora.lora_targets]
        self.adapters = nn.ModuleDict({p.name: Adapter(base.in_features, p.rows, lora) for p in targets})

    def forward(self, x_BSI: Tensor) -> Tensor:
        y_BSO = super().forward(x_BSI)
        gains = [
            self.adapters[part.name](x_BSI)
            if part.name in self.adapters
            else y_BSO.new_zeros(*y_BSO.shape[:-1], part.rows)
            for part in self.parts
        ]
        return y_BSO + (gains[0] if len(gains) == 1 else torch.cat(gains, -1))

    def of_rows(self, x_BSI: Tensor, rows: slice) -> Tensor:
        """Rows of the first part."""
        first = self.parts[0]
        assert rows.stop <= first.rows, "of one adapter"
        y_BSr = super().of_rows(x_BSI, rows)
        if first.name not in self.adapters:
            return y_BSr
        adapter = self.adapters[first.name]
        assert isinstance(adapter, Adapter)
        return y_BSr + adapter.of_rows(x_BSI, rows)


def attach(model: Transformer, lora: LoraConfig) -> None:
    """Freeze every weight of the model and put adapters beside those that `lora` names, drawn from torch's generator.
    The weights keep their names."""
    model.requires_grad_(False)
    for block in model.blocks:
        for place, parts in projections(model.config).items():
            if any(part.name in lora.lora_targets for part in parts):
                owner, name = place.split(".")
                within = block.get_submodule(owner)
                setattr(within, name, AdaptedLinear(within.get_submodule(name), parts, lora))  # type: ignore[arg-type]


def gain(weight: str, config: ModelConfig, lora: LoraConfig, read: Callable[[str], Tensor]) -> Tensor | None:
    """What merging adds to one of the model's parameters: scale * B A of each part, float32 (O, I); None where nothing
    is adapted. `read` gives an adapter matrix by its name."""
    if not weight.startswith("blocks.") or not weight.endswith(".weight"):
        return None
    _, layer, place = weight.removesuffix(".weight").split(".", 2)
    parts = projections(config).get(place, [])
    if not any(part.name in lora.lora_targets for part in parts):
        return None
    pieces: list[Tensor | None] = []
    for part in parts:
        name = f"blocks.{layer}.{place}.adapters.{part.name}"
        adapted = part.name in lora.lora_targets
        pieces.append(read(f"{name}.b").float() @ read(f"{name}.a").float() * lora.lora_scale if adapted else None)
    inputs = next(piece.shape[1] for piece in pieces if piece is not None)
    rows = [torch.zeros(p.rows, inputs) if piece is None else piece for p, piece in zip(parts, pieces, strict=True)]
    return torch.cat(rows)


def peft_names(config: ModelConfig, lora: LoraConfig) -> Iterator[tuple[str, str]]:
    """(our name, peft's name) of every adapter matrix, as adapter_model.safetensors has it. Raises UserError where
    transformers has no such projection."""
    homes = {"attention": "self_attn", "feed_forward": "mlp"}
    for place in ("attention.qkv", "feed_forward.gate_up"):
        theirs = family_of(config).tensors(f"blocks.0.{place}.weight", config)
        if len(theirs) == 1:
            raise UserError(
                f"family {config.family} has its projections fused ({theirs[0].name}): its adapters have no peft form",
                "Export the merged model with --format hf.",
            )
    for ours in shapes(config, lora):
        _, layer, owner, _, _, projection, kind = ours.split(".")
        yield ours, f"base_model.model.model.layers.{layer}.{homes[owner]}.{projection}.lora_{kind.upper()}.weight"


def trained_parameters(config: Config) -> int:
    """How many weights are trained, and saved: the adapters' where there are any, else all."""
    if not config.lora_rank:
        return config.num_parameters()
    return sum(rows * columns for rows, columns in shapes(config, config).values())
