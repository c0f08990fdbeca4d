"""Phi-3 and Phi-4: projections that are fused in the files too, a window, heads of which a part is rotated.

Reference: arXiv:2404.14219, arXiv:2412.08905. Their longrope scaling is refused: its frequencies hang on how long a
text is, so that keys in a cache would have to be rotated anew.
"""

from __future__ import annotations

from typing import Any

from lumina.config import ModelConfig
from lumina.model.families import Family, RowSlice


class _Phi3(Family):
    def tensors(self, ours: str, config: ModelConfig) -> list[RowSlice]:
        theirs = super().tensors(ours, config)
        if len(theirs) == 1:
            return theirs
        fused = theirs[0].name.replace("q_proj", "qkv_proj").replace("gate_proj", "gate_up_proj")
        return [RowSlice(fused, sum(part.rows for part in theirs))]

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        return super().to_hf(config) | {
            "partial_rotary_factor": config.partial_rotary_factor,
            "original_max_position_embeddings": config.seq_length,
        }


FAMILY = _Phi3(
    "Phi3ForCausalLM",
    settings=("partial_rotary_factor", "sliding_window"),
    named={"sliding_window": "sliding_window"},
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None},
    keys={"resid_pdrop": 0.0, "embd_pdrop": 0.0},
)
