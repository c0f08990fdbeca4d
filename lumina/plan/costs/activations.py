"""Activations of one rank: what autograd keeps for the fused operators of lumina.model on a GPU, and what a layer's
backward pass adds to it.

A layer keeps, per token: the summed residual and the normed input of both halves with a float32 scale each; what
attention keeps (`_attention`); gate and up, and their product. A recomputed layer keeps its input only: the
residual sum, on the device or on the host. In tiles, the second half keeps its residual sum alone.

Sizes are bytes, per token that the rank holds where nothing else is said.
"""

from __future__ import annotations

from lumina.config import ModelConfig
from lumina.plan.costs.setup import FP32, Setup
from lumina.plan.costs.workload import dispatched, feed_forward_width

UNDER_WAY = 2  # copies between device and host at a time (lumina/model/memory/offload.py)


def activation_bytes_per_token(model: ModelConfig, setup: Setup) -> float:
    """What autograd keeps over all layers."""
    again = _recomputed(model, setup)
    inputs = setup.element * model.hidden_size
    kept = 0 if setup.activation_offloading else again * inputs
    return (model.num_layers - again) * layer_bytes_per_token(model, setup) + kept


def host_bytes(model: ModelConfig, setup: Setup) -> int:
    """Bytes of recomputed layers' inputs on the host of this rank, whose buffers hold powers of two of numbers."""
    if not setup.activation_offloading:
        return 0
    numbers = setup.tokens(model) * model.hidden_size
    return _recomputed(model, setup) * setup.element * (1 << (numbers - 1).bit_length())


def offloaded_bytes(model: ModelConfig, setup: Setup) -> float:
    """Bytes that go to the host in a micro-batch and come back."""
    if not setup.activation_offloading:
        return 0.0
    return float(_recomputed(model, setup) * setup.element * model.hidden_size * setup.tokens(model))


def under_way_bytes_per_token(model: ModelConfig, setup: Setup) -> float:
    """Inputs of recomputed layers on the device while they are copied: to the host, until the first of them comes back,
    or this layer's and that of the one below, back."""
    if not setup.activation_offloading:
        return 0.0
    return min(UNDER_WAY, _recomputed(model, setup)) * setup.element * model.hidden_size


def layer_bytes_per_token(model: ModelConfig, setup: Setup) -> float:
    """What autograd keeps of a layer that is not recomputed, or is at its recomputation."""
    first, second = _norms(model, setup)
    if setup.mlp_tile:
        return first + _attention(model, setup) + setup.element * model.hidden_size
    return first + second + _attention(model, setup) + _feed_forward(model, setup)


def outside_bytes_per_token(model: ModelConfig) -> int:
    """Beside the layers: the rotary tables, ids, positions, targets and weights."""
    return FP32 * model.head_dim + 28


def last_layers_backward(model: ModelConfig, setup: Setup) -> float:
    """What is alive in the backward pass of the last layer, and of the last that is recomputed, beside what autograd
    keeps: the recomputed layer itself, where none above it has given up as much, and its results' gradient."""
    above = (model.num_layers - 1) % setup.checkpoint_every if setup.checkpoint_every else 0
    recomputed = bool(setup.checkpoint_every) and not above
    kept = layer_bytes_per_token(model, setup)
    if recomputed:  # its first residual sum is its input, which is counted among what autograd keeps, or on its way
        kept = float(setup.element * model.hidden_size)
    # From the host: this layer's input, and that of the one below. Above the last that is recomputed, in their place:
    # those that were copied last.
    return _backward(model, setup, recomputed) - kept + under_way_bytes_per_token(model, setup)


def first_layers_backward(model: ModelConfig, setup: Setup) -> float:
    """What is alive in the backward pass of the first layer, all of it: the layer, whose input is its first residual
    sum too, and the gradients of both its results, which are one where the layer above is recomputed from their sum."""
    gradients = setup.element * model.hidden_size if setup.checkpoint_every != 1 else 0
    return gradients + _backward(model, setup, bool(setup.checkpoint_every))


def _recomputed(model: ModelConfig, setup: Setup) -> int:
    return -(-model.num_layers // setup.checkpoint_every) if setup.checkpoint_every else 0


def _norms(model: ModelConfig, setup: Setup) -> tuple[float, float]:
    """What the norms of either half keep, and the products after them of their results."""
    hidden = setup.element * model.hidden_size
    half = 2 * hidden + FP32
    if model.structure.arrangement == "sandwich":  # another norm, that adds no residual
        half += hidden + FP32
    return half, half


def _widths(model: ModelConfig, setup: Setup) -> tuple[int, int, int]:
    """Bytes of a token's queries, of its keys (or values), and of those as ranks that share rows exchange them."""
    head = setup.element * model.head_dim
    return head * model.num_heads, head * model.num_kv_heads, head * setup.exchanged_heads(model)[1]


def _attention(model: ModelConfig, setup: Setup) -> float:
    """Rotated queries and keys, and values; attention's result and a float32 log-sum per head. Where ranks share rows:
    queries, keys and values of all tokens and a part of the heads, as they were exchanged, and the result before and
    after its own exchange. Norms of queries and keys keep the projection of all three besides, of which the values are
    a view unless they were exchanged."""
    queries, keys, exchanged = _widths(model, setup)
    if setup.head_groups > 1:  # the projection, whose queries have given way to the result
        return queries + 2 * keys + FP32 * model.num_heads + _scores(model, setup)
    kept: float = queries + 2 * exchanged + queries + FP32 * model.num_heads
    if setup.sequence_parallel > 1 and not setup.on_cpu:
        kept += queries
    if model.structure.qk_norm:
        kept += queries + 2 * keys - (keys if setup.sequence_parallel == 1 else 0)
    return kept + _scores(model, setup)


def _workspace(model: ModelConfig, setup: Setup) -> float:
    """What FlashAttention 2 allocates for its backward pass (flash_api.cpp, mha_varlen_bwd): the queries' gradient and
    a sum per head in float32, and where key/value heads are fewer than query heads a gradient of either for each of
    these. Version 3 takes less. With `deterministic: true` the first is there once for every block that works on a
    head, which is not counted."""
    if setup.on_cpu or setup.element == FP32 or model.attention_softcap is not None:
        return 0.0
    queries, keys, exchanged = _widths(model, setup)
    grouped = (exchanged if setup.sequence_parallel > 1 else keys) < queries
    return queries * FP32 / setup.element + FP32 * model.num_heads + (2 * queries if grouped else 0)


def _scores(model: ModelConfig, setup: Setup) -> float:
    """Under a soft cap, (S, S) of a document: what tanh and softmax gave, and its rounded copy."""
    if model.attention_softcap is None:
        return 0.0
    document = min(setup.document_tokens or model.seq_length, model.seq_length)
    return model.num_heads * document * (2 * FP32 + setup.element)


def _feed_forward(model: ModelConfig, setup: Setup) -> float:
    e, copies = setup.element, dispatched(model)
    kept = e * 3 * feed_forward_width(model) + 2 * e * model.hidden_size * copies  # of experts also inputs and outputs
    if model.experts is not None:  # the router's logits, in float32 too, and their softmax
        kept += (e + 2 * FP32) * model.experts.count * model.expert_layers / model.num_layers
    return kept


def _backward(model: ModelConfig, setup: Setup, recomputed: bool) -> float:
    """The most that is alive of one layer in its backward pass: in that of the feed-forward part, where the gradient of
    the product takes the product's place and that of gate and up comes beside it, or in that of attention."""
    e, hidden = setup.element, setup.element * model.hidden_size
    queries, keys, exchanged = _widths(model, setup)
    first, second = _norms(model, setup)
    outside = hidden  # the gradient of its result
    feed_forward = first + second + _attention(model, setup) + _feed_forward(model, setup)
    # Or, of a narrow one, the gradient of its input; recomputed, attention's result and its own.
    feed_forward += max(e * 2 * feed_forward_width(model), hidden * (2 if recomputed else 1))
    if setup.mlp_tile:  # the residual sum and its gradient, and one tile
        feed_forward = first + _attention(model, setup) + 2 * hidden + _tile(model, setup) / setup.tokens(model)
    # Of attention: gradients of its result, queries, keys and values, and of the residual.
    attention = first + hidden + _attention(model, setup) + queries + 2 * keys
    attention += queries if setup.sequence_parallel == 1 else 2 * (exchanged - keys)
    attention -= queries if setup.on_cpu and setup.sequence_parallel == 1 else 0  # the result
    attention += _workspace(model, setup)
    if setup.head_groups > 1:
        attention = first + hidden + _attention(model, setup) + queries + _group(model, setup)
    attention += outside if recomputed else 0  # which is needed no more, but held
    exchange = _exchange(model, setup) if recomputed and setup.head_groups == 1 else 0.0
    return max(outside + feed_forward, attention, exchange)


def _group(model: ModelConfig, setup: Setup) -> float:
    """Of one group of heads in its backward pass, in that of attention: queries, keys and values made again and their
    gradients, attention's result and its gradient; where ranks share rows, as they are exchanged, or, if keys and
    values are repeated, what comes back. Norms of queries keep the projection of these besides."""
    queries, keys, exchanged = _widths(model, setup)
    result, workspace = 0 if setup.on_cpu else queries, _workspace(model, setup)
    if setup.sequence_parallel == 1:
        found = 3 * queries + 3 * keys + result + workspace
    else:
        found = 4 * queries + 4 * exchanged + result + workspace
        if exchanged > keys:
            found = max(found, 3 * queries + 7 * exchanged + keys)
    return (found + (queries if model.structure.qk_norm else 0)) / setup.head_groups


def _tile(model: ModelConfig, setup: Setup) -> float:
    """Bytes of one tile of the feed-forward in its backward pass, and of the weights' gradients: those that add up, in
    float32, and the tile's own."""
    e, hidden, width = setup.element, setup.element * model.hidden_size, feed_forward_width(model)
    tokens = min(setup.mlp_tile, setup.tokens(model))
    inside = _norms(model, setup)[1] + 2 * hidden + e * 5 * width  # with its result, and the last tile's gradient
    return tokens * inside + (FP32 + e) * 3 * model.hidden_size * width


def _exchange(model: ModelConfig, setup: Setup) -> float:
    """What is alive of a recomputed layer around its attention, where ranks share rows: the gradient of its result, the
    first half's norm, the projection, queries and keys rotated; before it keys and values repeated, and all of them
    joined before and after the exchange; after it what was exchanged, and the result before and after its own exchange
    and laid out again."""
    hidden = setup.element * model.hidden_size
    queries, keys, exchanged = _widths(model, setup)
    if setup.sequence_parallel == 1:
        return 0.0
    repeated = 2 * exchanged if exchanged > keys else 0
    around = hidden + _norms(model, setup)[0] + 2 * queries + 3 * keys
    before = repeated + 2 * (queries + 2 * exchanged)
    after = queries + 2 * exchanged + 3 * queries + FP32 * model.num_heads
    return around + max(before, after)
