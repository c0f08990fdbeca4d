"""The fused matrices of a block: which projections each one holds, and how many rows are each one's.

Queries, keys and values are one product, and so are gate and up: fewer, larger products for the same result.
"""

from __future__ import annotations

from typing import NamedTuple

from lumina.config import ModelConfig


class RowSlice(NamedTuple):
    """Some rows of one of our parameters that have a name of their own: a projection, or a tensor in transformers."""

    name: str
    rows: int


def projections(config: ModelConfig) -> dict[str, list[RowSlice]]:
    """The matrices of a block, by name within the block, and their projections, in order of rows."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "attention.qkv": [RowSlice("q_proj", queries), RowSlice("k_proj", keys), RowSlice("v_proj", keys)],
        "attention.out": [RowSlice("o_proj", config.hidden_size)],
        "feed_forward.gate_up": [RowSlice("gate_proj", config.ffn_size), RowSlice("up_proj", config.ffn_size)],
        "feed_forward.down": [RowSlice("down_proj", config.hidden_size)],
    }
