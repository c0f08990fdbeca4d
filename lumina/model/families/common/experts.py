"""What families of experts have in common: the names of their tensors, and their part of config.json both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lumina.config import ModelConfig, UserError
from lumina.model.families.common import config_json
from lumina.model.families.common.family import Family
from lumina.model.fused import RowSlice


@dataclass(frozen=True)
class ExpertFamily(Family):
    """A family whose feed-forward layers are mixtures of experts.

    module: what files call such a layer, in which `gate` is the router. gate_up, down: an expert's projections there.
    count: config.json's key for the number of experts. width: its key for the width of one, where that is not
    intermediate_size. normalises: whether chosen probabilities are divided by their sum, where config.json does not
    say. mixed: whether layers may be dense. loss_weight: of the load-balancing loss, where config.json has none.
    """

    module: str = "mlp"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    count: str = "num_experts"
    width: str | None = None
    normalises: bool | None = None
    mixed: bool = False
    loss_weight: float = 0.001
    expert_defaults: Mapping[str, Any] = field(default_factory=dict)

    # --- Weights ----------------------------------------------------------------------------------

    def tensors(self, ours: str, config: ModelConfig) -> list[RowSlice]:
        """As Family.tensors; released models hold every expert's matrices one by one."""
        found = self._expert_part(ours, config)
        if found is None:
            return super().tensors(ours, config)
        prefix, part = found
        assert config.experts is not None
        if part == "router":
            return [RowSlice(f"{prefix}.{self.module}.gate.weight", config.experts.count)]
        names, rows = (self.gate_up, config.expert_size) if part == "gate_up" else ((self.down,), config.hidden_size)
        within = f"{prefix}.{self.module}.experts"
        return [RowSlice(f"{within}.{e}.{name}.weight", rows) for e in range(config.experts.count) for name in names]

    def layouts(self, ours: str, config: ModelConfig) -> list[list[RowSlice]]:
        """transformers 5 itself stacks the experts' matrices as we do, and so may a file."""
        found = self._expert_part(ours, config)
        if found is None:
            return super().layouts(ours, config)
        released, (prefix, part) = self.tensors(ours, config), found
        name = "gate.weight" if part == "router" else f"experts.{part}_proj"
        return [released, [RowSlice(f"{prefix}.mlp.{name}", sum(one.rows for one in released))]]

    def _expert_part(self, ours: str, config: ModelConfig) -> tuple[str, str] | None:
        """Of a parameter of a layer of experts: the layer's prefix in files, and router, gate_up or down."""
        parts = ours.split(".")
        if len(parts) != 5 or parts[2] != "feed_forward" or not config.has_experts(int(parts[1])):
            return None
        return f"model.layers.{parts[1]}", parts[3]

    def experts_fault(self, config: ModelConfig) -> str | None:
        experts = config.experts
        if experts is None:
            return f"family {config.family} needs experts"
        if experts.dense_layers and not self.mixed:
            return f"experts: family {config.family} has no dense_layers"
        if experts.size is not None and self.width is None:
            return f"experts: size is intermediate_size in family {config.family}"
        if self.normalises is not None and experts.norm_topk_prob != self.normalises:
            return f"experts: norm_topk_prob is always {str(self.normalises).lower()} in family {config.family}"
        return experts.fault(config.num_layers)

    # --- config.json ------------------------------------------------------------------------------

    def settings_of(self, values: dict[str, Any]) -> dict[str, Any]:
        counts = [values[key] for key in ("num_experts", "num_local_experts") if values.get(key) is not None]
        if len(counts) == 2 and counts[0] != counts[1]:
            raise UserError(f"num_experts {counts[0]} and num_local_experts {counts[1]} are not the same")
        if values.get("router_jitter_noise"):
            raise UserError(f"router_jitter_noise is not supported ({json.dumps(values['router_jitter_noise'])})")
        given = {**self.expert_defaults, **values}
        experts: dict[str, Any] = {"count": counts[0] if counts else given.get(self.count)}
        experts["per_token"] = given.get("num_experts_per_tok")
        if self.width is not None:
            experts["size"] = given.get(self.width)
        normalises = given.get("norm_topk_prob", False) if self.normalises is None else self.normalises
        experts["norm_topk_prob"] = normalises
        if self.mixed:
            experts["dense_layers"] = _dense_layers(given)
        for key in ("num_experts", "num_local_experts"):
            values.pop(key, None)
        return {"experts": experts, "router_aux_loss_coef": values.get("router_aux_loss_coef", self.loss_weight)}

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        experts = config.experts
        assert experts is not None
        written = super().to_hf(config) | {
            self.count: experts.count,
            "num_experts_per_tok": experts.per_token,
            "router_aux_loss_coef": config.router_aux_loss_coef,
            "output_router_logits": False,
        }
        if self.width is not None:
            written[self.width] = config.expert_size
        if self.normalises is None:
            written["norm_topk_prob"] = experts.norm_topk_prob
        if self.mixed:
            written |= {"decoder_sparse_step": 1, "mlp_only_layers": list(experts.dense_layers)}
        return written


def _dense_layers(values: dict[str, Any]) -> list[int]:
    """Layers that decoder_sparse_step and mlp_only_layers leave dense."""
    step, named, layers = (values.get(key) for key in ("decoder_sparse_step", "mlp_only_layers", "num_hidden_layers"))
    if type(step) is not int or step < 1:
        raise UserError(f"decoder_sparse_step {json.dumps(step)} is not a whole number above 0")
    if not isinstance(named or [], list) or type(layers) is not int or layers > config_json.MOST_LAYERS:
        raise UserError(f"mlp_only_layers {json.dumps(named)} of num_hidden_layers {json.dumps(layers)} say nothing")
    return [layer for layer in range(layers) if layer in (named or []) or (layer + 1) % step]
