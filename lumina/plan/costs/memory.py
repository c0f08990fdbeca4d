"""Memory of one rank, by part, at the two moments that can be the highest: the end of the forward pass (activations are
all there, gradients begin) and the optimizer step (activations are gone, float32 copies of gradients are there).

Weights, master weights and moments are what DeepSpeed 0.19 allocates, to the byte (tests/plan/costs/test_memory.py
holds them against real runs). It keeps two flat buffers, one per parameter group (decayed matrices; norms and
embeddings):

- stage 0: nothing is shared. In half precision each tensor has a float32 master copy; in float32 the weights are it.
- stages 1, 2: each group is padded to a multiple of 2 * world; weights whole, master and moments 1/world of it.
- stage 3: each tensor is padded to a multiple of world and every rank keeps 1/world; small ones are also kept whole.

Activations are those that autograd keeps for the fused operators of lumina.model on a GPU. Sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from lumina.config import ModelConfig, output_chunk_bytes
from lumina.plan.costs.setup import Buffers, Setup
from lumina.plan.costs.workload import dispatched, feed_forward_width

CONTEXT = 1.2e9  # CUDA context, cuBLAS workspaces and NCCL buffers; outside PyTorch's allocator
FRAGMENTATION = 0.05  # of what PyTorch's allocator holds
FP32 = 4


@dataclass(frozen=True)
class PeakMemory:
    """Bytes on the device by part, and on the host. `moment` is when this peak happens."""

    moment: str
    weights: float
    gathered: float  # weights of the layers at work under stage 3
    gradients: float
    master: float
    moments: float
    activations: float
    output: float  # logits chunk and the gradients that the loss holds
    buffers: float  # communication buckets
    margin: float
    host: float

    @property
    def device(self) -> float:
        return float(sum(getattr(self, part) for part in PARTS))


PARTS = tuple(field.name for field in fields(PeakMemory) if field.name not in ("moment", "host"))


def parameter_groups(model: ModelConfig) -> tuple[list[int], list[int]]:
    """Element counts of every tensor: the matrices that decay, then embeddings and norms that do not."""
    h, d = model.hidden_size, model.head_dim
    attention = [h * d * (model.num_heads + 2 * model.num_kv_heads), h * d * model.num_heads]
    decayed = attention * model.num_layers
    decayed += [2 * h * model.ffn_size, h * model.ffn_size] * (model.num_layers - model.expert_layers)
    if model.experts is not None:
        count, width = model.experts.count, model.expert_size
        decayed += [h * count, 2 * h * width * count, h * width * count] * model.expert_layers
    biases = [d * (model.num_heads + 2 * model.num_kv_heads)] if model.structure.qkv_bias else []
    free = [model.vocab_size * h, h, *(biases + model.norm_widths) * model.num_layers]
    if not model.tie_word_embeddings:
        decayed.append(model.vocab_size * h)
    return decayed, free


@dataclass(frozen=True)
class States:
    """What stays allocated between steps, in bytes."""

    weights: int
    master: int
    moments: int


def states(model: ModelConfig, setup: Setup, persistence: int = 0) -> States:
    """Weights, master weights and Adam's two moments of one rank, wherever they are kept."""
    groups, world, element = parameter_groups(model), setup.world, setup.element
    if setup.stage == 0:
        total = sum(map(sum, groups))
        return States(element * total, 0 if element == FP32 else FP32 * total, 2 * FP32 * total)
    if setup.stage < 3:
        padded = sum(_up(sum(group), 2 * world) for group in groups)
        return States(element * padded, FP32 * padded // world, 2 * FP32 * padded // world)
    shard = sum(-(-count // world) for group in groups for count in group)
    # A single rank's share is the whole tensor already: DeepSpeed then keeps no second one.
    small = [count for group in groups for count in group if count < persistence and world > 1]
    whole = sum(_up(count, world) for count in small)
    second = sum(-(-count // setup.hpz) for group in groups for count in group) if setup.hpz > 1 else 0
    return States(element * (shard + whole + second), FP32 * shard, 2 * FP32 * shard)


def activation_bytes_per_token(model: ModelConfig, setup: Setup) -> float:
    """What autograd keeps per token, over all layers.

    A layer keeps, per token: the summed residual and the normed input of both halves with a float32 scale each; the
    projection of queries, keys and values (attention reads the values in place) and the rotated queries and keys; the
    attention's result and a float32 log-sum per head; gate and up, and their product. A recomputed layer keeps its two
    inputs only: the last layer's result and the residual sum, which the layer before it keeps too unless that one is
    recomputed as well. The first layer, always among the recomputed, has one input.
    """
    whole, again = _layer_activations(model, setup)
    inputs = setup.element * model.hidden_size
    own_residuals = again - 1 if setup.checkpoint_every == 1 else 0
    return (model.num_layers - again) * whole + (again + own_residuals) * inputs


def _layer_activations(model: ModelConfig, setup: Setup) -> tuple[float, int]:
    """Bytes per token of a layer that keeps all, and how many layers are recomputed."""
    e, h, f, d = setup.element, model.hidden_size, feed_forward_width(model), model.head_dim
    queries, keys = model.num_heads * d, model.num_kv_heads * d
    after = 2 if model.structure.arrangement == "sandwich" else 0  # norms that add no residual
    norms = 2 * (2 * e * h + FP32) + after * (e * h + FP32)
    attention: float = e * (queries + 2 * keys) + e * (queries + keys) + e * queries + FP32 * model.num_heads
    if model.attention_softcap is not None:  # (S, S) of a document: what tanh and softmax gave, and its rounded copy
        document = min(setup.document_tokens or model.seq_length, model.seq_length)
        attention += int(model.num_heads * document * (2 * FP32 + e))
    feed_forward = e * 3 * f + 2 * e * h * dispatched(model)  # of experts also their inputs and outputs
    if model.experts is not None:  # the router's logits, in float32 too, and their softmax
        feed_forward += (e + 2 * FP32) * model.experts.count * model.expert_layers / model.num_layers
    again = -(-model.num_layers // setup.checkpoint_every) if setup.checkpoint_every else 0
    return float(norms + attention + feed_forward), again


def peak_memory(
    model: ModelConfig, setup: Setup, buffers: Buffers | None = None, capacity: float | None = None
) -> PeakMemory:
    """The higher of the two moments. `capacity`: the device's memory in bytes, which bounds the chunks of the output
    layer (lumina.config.rows); None: no bound."""
    buffers = buffers or Buffers()
    return max((_forward_end(model, setup, buffers, capacity), _update(model, setup, buffers)), key=lambda m: m.device)


def _kept(model: ModelConfig, setup: Setup, buffers: Buffers) -> tuple[dict[str, float], float]:
    """Parts that are there all the time, and the bytes on the host."""
    held = states(model, setup, buffers.persistence)
    optimizer_on_host = held.master + held.moments if setup.offload_optimizer else 0
    weights_on_host = held.weights if setup.offload_params else 0
    parts: dict[str, float] = {
        "weights": held.weights - weights_on_host,
        "master": 0 if setup.offload_optimizer else held.master,
        "moments": 0 if setup.offload_optimizer else held.moments,
    }
    gradients_on_host = held.master if setup.offload_optimizer else 0
    return parts, float(optimizer_on_host + weights_on_host + gradients_on_host)


def _gradients(model: ModelConfig, setup: Setup) -> float:
    """Gradients that wait for the update: all of them under stages 0 and 1, the rank's share under 2 and 3."""
    if setup.offload_optimizer and setup.stage >= 2:
        return 0.0
    share = setup.world if setup.stage >= 2 else 1
    return setup.element * model.num_parameters() / share


def _forward_end(model: ModelConfig, setup: Setup, buffers: Buffers, capacity: float | None) -> PeakMemory:
    parts, host = _kept(model, setup, buffers)
    element, tokens = setup.element, setup.micro_batch * model.seq_length * setup.fill
    whole, again = _layer_activations(model, setup)
    rotary_and_inputs = tokens * (FP32 * model.head_dim + 28)
    recomputing = whole * tokens if again else 0.0
    table = model.vocab_size * model.hidden_size
    supervised = tokens * setup.supervised
    chunks = supervised * model.vocab_size * element
    # The loss keeps the gradient of the table (float32 while several chunks add up) and of the hidden states.
    chunk = output_chunk_bytes(model.vocab_size, element, capacity)
    output = min(chunk, chunks) + table * (FP32 if chunks > chunk else element)
    output += 2 * supervised * model.hidden_size * element
    layer = (model.num_parameters(False) - model.hidden_size) / model.num_layers
    gathered = element * min(model.num_parameters(), max(table, layer, buffers.live)) if setup.stage == 3 else 0.0
    bucket = element * buffers.reduce_bucket * (2 if buffers.overlap else 1) if setup.stage and setup.world > 1 else 0.0
    # Gradients of earlier micro-batches are there already; with a single one they only begin to appear.
    parts |= {
        "gathered": gathered,
        "gradients": _gradients(model, setup) if setup.accumulation > 1 or setup.stage == 3 else 0.0,
        "activations": tokens * activation_bytes_per_token(model, setup) + recomputing + rotary_and_inputs,
        "output": output,
        "buffers": bucket,
    }
    return _with_margin("forward pass", parts, host)


def _update(model: ModelConfig, setup: Setup, buffers: Buffers) -> PeakMemory:
    parts, host = _kept(model, setup, buffers)
    groups, share = parameter_groups(model), setup.world if setup.stage else 1
    copies = 0.0
    if setup.element < FP32 and not setup.offload_optimizer:
        # float32 copies: of everything under stage 0, of one group (1, 2) or sub-group (3) at a time.
        at_once = sum(map(sum, groups)) if setup.stage == 0 else max(map(sum, groups)) / share
        copies = FP32 * min(at_once, buffers.sub_group if setup.stage == 3 else at_once)
    parts |= {
        "gathered": 0.0,
        "gradients": _gradients(model, setup) + copies,
        "activations": 0.0,
        "output": 0.0,
        "buffers": setup.element * buffers.reduce_bucket if setup.stage == 3 else 0.0,
    }
    return _with_margin("optimizer step", parts, host)


def _with_margin(moment: str, parts: dict[str, float], host: float) -> PeakMemory:
    return PeakMemory(moment=moment, **parts, margin=CONTEXT + FRAGMENTATION * sum(parts.values()), host=host)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
