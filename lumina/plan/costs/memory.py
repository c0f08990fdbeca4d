"""Memory of one rank, by part, at the moments that can be the highest: in the output layer (all that autograd keeps is
there, and the logits), in the backward pass of the last layer (which is there once more where it is recomputed), in
that of the first (all gradients are there) and in the optimizer step (activations are gone, float32 copies of gradients
are there).

Weights, master weights and moments are what DeepSpeed 0.19 allocates, to the byte (tests/plan/costs/test_memory.py
holds them against real runs). It keeps two flat buffers, one per parameter group (decayed matrices; norms and
embeddings):

- stage 0: nothing is shared. In half precision each tensor has a float32 master copy; in float32 the weights are it.
- stages 1, 2: each group is padded to a multiple of 2 * world; weights whole, master and moments 1/world of it.
- stage 3: each tensor is padded to a multiple of world and every rank keeps 1/world; small ones are also kept whole.

Activations are in activations.py. Sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from lumina.config import CHUNK_BYTES, ModelConfig, output_chunk_bytes
from lumina.plan.costs import activations
from lumina.plan.costs.setup import FP32, Buffers, Setup

CONTEXT = 1.2e9  # CUDA context, cuBLAS workspaces and NCCL buffers; outside PyTorch's allocator
FRAGMENTATION = 0.05  # of what PyTorch's allocator holds


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


def peak_memory(
    model: ModelConfig, setup: Setup, buffers: Buffers | None = None, capacity: float | None = None
) -> PeakMemory:
    """The highest of the moments. `capacity`: the device's memory in bytes, which bounds the chunks of the output
    layer (lumina.config.rows); None: no bound."""
    buffers = buffers or Buffers()
    moments = (
        output_layers_memory(model, setup, buffers, capacity),
        _backward(model, setup, buffers, first=False),
        _backward(model, setup, buffers, first=True),
        _update(model, setup, buffers),
    )
    return max(moments, key=lambda moment: moment.device)


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
    host = optimizer_on_host + weights_on_host + gradients_on_host
    return parts, float(host + activations.host_bytes(model, setup))


def _gradients(model: ModelConfig, setup: Setup) -> float:
    """Gradients that wait for the update: all of them under stages 0 and 1, the rank's share under 2 and 3."""
    if setup.offload_optimizer and setup.stage >= 2:
        return 0.0
    share = setup.world if setup.stage >= 2 else 1
    return setup.element * model.num_parameters() / share


def output_layers_memory(
    model: ModelConfig, setup: Setup, buffers: Buffers | None = None, capacity: float | None = None
) -> PeakMemory:
    """What is held at the end of the forward pass, in the output layer; the arguments are `peak_memory`'s."""
    buffers = buffers or Buffers()
    parts, host = _kept(model, setup, buffers)
    element, tokens = setup.element, setup.tokens(model)
    hidden = element * model.hidden_size
    table = model.vocab_size * model.hidden_size
    supervised = tokens * setup.supervised
    chunks = supervised * model.vocab_size * element
    # The loss keeps the gradient of the table (float32 while several chunks add up) and of the hidden states.
    chunk = CHUNK_BYTES if setup.on_cpu else output_chunk_bytes(model.vocab_size, element, capacity)
    output = min(chunk, chunks) + table * (FP32 if chunks > chunk else element) + 2 * supervised * hidden
    kept = activations.activation_bytes_per_token(model, setup) + activations.outside_bytes_per_token(model)
    kept += activations.under_way_bytes_per_token(model, setup)
    # Gradients of earlier micro-batches are there already; with a single one they only begin to appear.
    earlier = setup.accumulation > 1 or setup.stage == 3
    parts |= {
        **_sharing(model, setup, buffers),
        "gradients": _gradients(model, setup) if earlier else 0.0,
        "activations": tokens * (kept + 2 * hidden),  # the last norm's input and result
        "output": output,
    }
    return _with_margin("output layer", parts, host)


def _backward(model: ModelConfig, setup: Setup, buffers: Buffers, first: bool) -> PeakMemory:
    """The backward pass of the last layer, or of the first."""
    parts, host = _kept(model, setup, buffers)
    earlier = setup.accumulation > 1 or setup.stage == 3
    own = setup.element * model.vocab_size * model.hidden_size if setup.stage < 2 else 0  # of the output layer
    alive = float(activations.outside_bytes_per_token(model))
    if first:
        alive += activations.first_layers_backward(model, setup)
    else:
        alive += activations.activation_bytes_per_token(model, setup) + activations.last_layers_backward(model, setup)
    parts |= {
        **_sharing(model, setup, buffers),
        "gradients": _gradients(model, setup) if first or earlier else float(own),
        "activations": setup.tokens(model) * alive,
        "output": _kept_logits(model, setup),
    }
    return _with_margin(f"backward pass of the {'first' if first else 'last'} layer", parts, host)


def _kept_logits(model: ModelConfig, setup: Setup) -> float:
    """Memory of logits that a CPU's output layer keeps for the next step (lumina.model.loss)."""
    if not setup.on_cpu:
        return 0.0
    logits = setup.tokens(model) * setup.supervised * model.vocab_size * setup.element
    return float(min(1.25 * logits, CHUNK_BYTES))


def _sharing(model: ModelConfig, setup: Setup, buffers: Buffers) -> dict[str, float]:
    """Gathered weights under stage 3, and the buckets in which gradients are reduced."""
    table = model.vocab_size * model.hidden_size
    layer = (model.num_parameters(False) - model.hidden_size) / model.num_layers
    gathered = float(min(model.num_parameters(), max(table, layer, buffers.live)) if setup.stage == 3 else 0)
    bucket = float(buffers.reduce_bucket * (2 if buffers.overlap else 1) if setup.stage and setup.world > 1 else 0)
    return {"gathered": setup.element * gathered, "buffers": setup.element * bucket}


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
