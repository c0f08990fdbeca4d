"""Workload of one optimizer step: matrix-product FLOPs, bytes through memory, bytes between ranks.

A product of (m, k) and (k, n) is 2mkn FLOPs. A token at position p of its document attends to p + 1 keys, or to a
window of them, so documents of L tokens cost (L + 1) / 2 keys per token at most: packing never pays for attention
across documents. The output layer runs at supervised positions only. Backward is twice forward for matrix products;
flash attention recomputes its scores, 2.5 times forward (arXiv:2307.08691, section 4). Recomputation is counted as work
but not as model FLOPs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lumina.config import ModelConfig
from lumina.plan.costs.setup import Setup

QUANTIZED = 1.002  # bytes of a gathered 8-bit weight: one, and a float32 scale for each group of 2,048


def layer_matrix_parameters(model: ModelConfig) -> float:
    """Elements of one layer's matrices that a token is multiplied with, the mean over the layers: of a layer's experts
    those that it goes through."""
    h, d = model.hidden_size, model.head_dim
    attention = h * d * (2 * model.num_heads + 2 * model.num_kv_heads)
    routers = 0.0 if model.experts is None else h * model.experts.count * model.expert_layers / model.num_layers
    return attention + 3 * h * feed_forward_width(model) + routers


def feed_forward_width(model: ModelConfig) -> float:
    """Width of the feed-forward part that a token goes through, the mean over the layers."""
    if model.experts is None:
        return float(model.ffn_size)
    used = model.experts.per_token * model.expert_size
    share = model.expert_layers / model.num_layers
    return share * used + (1 - share) * model.ffn_size


def dispatched(model: ModelConfig) -> float:
    """Copies of a token's hidden state that go to experts and back, the mean over the layers."""
    return 0.0 if model.experts is None else model.experts.per_token * model.expert_layers / model.num_layers


def attended_keys(model: ModelConfig, documents: Sequence[float] | NDArray[np.float64]) -> float:
    """Keys that the queries of documents of these lengths attend to, summed over queries and layers."""
    lengths = np.asarray(documents, dtype=np.float64)
    total = 0.0
    for window, layers in Counter(layer.window for layer in model.layers).items():
        most = lengths if window is None else np.minimum(lengths, window)
        total += layers * float((most * (most + 1) / 2 + (lengths - most) * most).sum())
    return total


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token's forward pass, by part."""

    layers: float  # matrix products of all layers
    attention: float  # scores and weighted values of all layers
    output: float  # the vocabulary product, averaged over supervised and other tokens

    @property
    def forward(self) -> float:
        return self.layers + self.attention + self.output

    @property
    def model(self) -> float:
        """Forward and backward without recomputation: what MFU counts."""
        return 3 * self.forward


def flops_per_token(model: ModelConfig, setup: Setup) -> Flops:
    """Forward FLOPs of one token."""
    document = min(setup.document_tokens or model.seq_length, model.seq_length)
    keys = attended_keys(model, [document]) / document
    width = model.num_heads * model.head_dim
    return Flops(
        layers=2.0 * model.num_layers * layer_matrix_parameters(model),
        attention=4.0 * width * keys,
        output=2.0 * model.hidden_size * model.vocab_size * setup.supervised,
    )


def recomputed_share(model: ModelConfig, setup: Setup) -> float:
    """Share of the layers whose forward pass runs twice."""
    if not setup.checkpoint_every:
        return 0.0
    return -(-model.num_layers // setup.checkpoint_every) / model.num_layers


def memory_bytes_per_token(model: ModelConfig, setup: Setup, values_copied: bool = True) -> float:
    """Bytes that element-wise kernels move per token, forward and backward, with the fused kernels of lumina.kernels:
    the fewest that each can move (norm and residual 8 + 8 bytes per element in bf16, rotary 4 + 4, SwiGLU 6 + 10, and
    five passes over the logits: product out, statistics, gradient in and out, product in). GELU's gate has no kernel,
    nor has a residual that is added before no norm, or a sublayer's multiplier. values_copied: attention's values are
    copied out of the projection that they are a view of, as Lumina's are where the norm of queries and keys or an
    exchange does not keep it anyway."""
    scale = setup.element / 2
    h, f = model.hidden_size, feed_forward_width(model)
    gate, gate_backward = gate_bytes(model, setup)
    rotated = (model.num_heads + model.num_kv_heads) * model.head_dim
    normed = (rotated if model.structure.qk_norm else 0) + (2 * h if model.structure.arrangement == "sandwich" else 0)
    forward = 16 * h + 4 * rotated + 4 * normed + gate * f
    backward = 16 * h + 4 * rotated + 6 * normed + gate_backward * f  # of a norm without a residual two are read
    if model.structure.arrangement == "post-norm":
        forward, backward = forward + 4 * h, backward + 8 * h
    if model.structure.qkv_bias:
        backward += 2 * (rotated + model.num_kv_heads * model.head_dim)
    if model.residual_multiplier != 1.0:
        forward, backward = forward + 8 * h, backward + 8 * h
    # To the experts and back: two gathers, and the weighted sum, which reads every copy once more.
    forward += 10 * h * dispatched(model)
    backward += 10 * h * dispatched(model)
    alone = setup.sequence_parallel == 1 and setup.head_groups == 1
    if values_copied and alone and not model.structure.qk_norm:  # where there is a graph
        backward += 4 * model.num_kv_heads * model.head_dim
    if setup.sequence_parallel > 1:  # joined by rank, and the result laid out again; as much on the way back
        queries, keys = (heads * model.head_dim for heads in setup.exchanged_heads(model))
        forward += 4 * (queries + 2 * keys) + 4 * queries
        backward += (4 * (queries + 2 * keys) + 4 * queries) * (2 if setup.head_groups > 1 else 1)
    if setup.head_groups > 1:  # the result put in place; queries and keys normed and rotated again, the result and its
        queries, keys = (heads * model.head_dim for heads in (model.num_heads, model.num_kv_heads))  # gradient laid out
        forward += 4 * queries
        backward += 4 * rotated * (2 if model.structure.qk_norm else 1) + 8 * queries + 4 * (queries + 2 * keys)
    if setup.mlp_tile:
        again = recomputed_share(model, setup)
        # Results and gradient put in place, the zero residual, and the sum that a recomputed layer makes alone; where
        # the layer is not recomputed, the half that the tiles make again.
        forward, backward = forward + 8 * h, backward + 6 * h + (1 - again) * (8 * h + gate * f) - 2 * again * h
        backward += tile_sum_bytes(setup) / scale * 3 * h * f / min(setup.mlp_tile, setup.tokens(model))
    layers = model.num_layers * (forward * (1 + recomputed_share(model, setup)) + backward)
    return scale * (layers + 5 * 2 * model.vocab_size * setup.supervised)


def gate_bytes(model: ModelConfig, setup: Setup) -> tuple[int, int]:
    """Bytes that the feed-forward's gate moves for each number of its width, forward and backward, as of bfloat16."""
    if model.structure.activation == "silu":
        return 6, 10
    return (38, 90) if setup.element == 2 else (10, 30)  # half precision is made float32 first, and rounded after


def tile_sum_bytes(setup: Setup) -> int:
    """Bytes that a tile of the feed-forward moves for each weight: its gradient written and read, and the float32 sum
    of the tiles'."""
    return 2 * setup.element + 8


def optimizer_bytes(model: ModelConfig, setup: Setup) -> float:
    """Bytes that AdamW moves per rank and step: master weight and two moments read and written, gradient read, weight
    written."""
    own = model.num_parameters() / (setup.world if setup.stage else 1)
    return own * (3 * 8 + 2 * setup.element)


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank receives in one step, by what they are (ring or equivalent collectives: the volumes of the
    ZeRO paper, arXiv:1910.02054, section 7)."""

    gradients: float
    weights: float
    near: float = 0.0  # weights that come from ranks of the same node only
    exchanged: float = 0.0  # queries, keys, values and results, between the ranks that share rows

    @property
    def of_weights(self) -> float:
        """What ZeRO moves."""
        return self.gradients + self.weights + self.near

    @property
    def total(self) -> float:
        return self.of_weights + self.exchanged


def exchanged_bytes(model: ModelConfig, setup: Setup) -> float:
    """Bytes that a rank receives in one step from those that it shares rows with (docs/long-context.md): per token of
    its own and layer, forward, backward, and forward again where the layer is recomputed; once more in the backward
    pass where heads are taken in groups."""
    share = (setup.sequence_parallel - 1) / setup.sequence_parallel
    numbers = 2 * sum(setup.exchanged_heads(model)) * model.head_dim * share
    passes = model.num_layers * (2 + recomputed_share(model, setup) + (setup.head_groups > 1))
    return setup.accumulation * setup.tokens(model) * passes * numbers * setup.element


def traffic(model: ModelConfig, setup: Setup) -> Traffic:
    """Communication of one step."""
    return replace(_zero_traffic(model, setup), exchanged=exchanged_bytes(model, setup))


def _zero_traffic(model: ModelConfig, setup: Setup) -> Traffic:
    """Gradients and weights, as DeepSpeed 0.19.8 moves them. Stage 0 all-reduces gradients once; 1 reduces them once
    and gathers the new weights; 2 reduces after every micro-batch; 3 also gathers weights before every forward and
    every backward pass, the latter within the node where hpZ keeps a copy there.

    Stages 1 and 2 reduce by all-reduces of whole buckets (use_multi_rank_bucket_allreduce, its default), of which each
    rank keeps its share: twice the bytes of stage 3's reduce-scatter.
    """
    share = (setup.world - 1) / setup.world
    whole = model.num_parameters() * setup.element * share
    reduced = whole if setup.reduce_scatter or setup.stage == 3 else 2 * whole
    if setup.stage == 0:
        return Traffic(2 * whole, 0.0)
    if setup.stage == 1:
        return Traffic(reduced, whole)
    if setup.stage == 2:
        return Traffic(reduced * setup.accumulation, whole)
    gathered = whole / setup.element * QUANTIZED if setup.quantized_weights else whole
    # Elements between a weight's two uses are twice those between it and the model's end.
    again = 1 - min(1.0, setup.reuse / 2 / model.num_parameters())
    if setup.hpz > 1:
        near = again * model.num_parameters() * setup.element * (setup.hpz - 1) / setup.hpz
        return Traffic(reduced * setup.accumulation, gathered * setup.accumulation, near * setup.accumulation)
    return Traffic(reduced * setup.accumulation, (1 + again) * gathered * setup.accumulation)
