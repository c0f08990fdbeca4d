"""Host time of a step: kernel launches, counted from the model's structure, times what the host needs for each.

A host that needs longer to queue a step than the device to run it is what limits a small model. What a launch costs is
one layer's host time over the launches in it: modules, dispatch, autograd, allocation and Triton's launcher together.

Not in it: the real driver's own time (a few us a launch), DeepSpeed's hooks for each gradient, waits of the host for
the device, and what torch.compile or CUDA graphs save. So it is a floor for an eager step on a host like the measured
one.
"""

from __future__ import annotations

from dataclasses import dataclass

from lumina.config import ModelConfig, output_chunk_bytes
from lumina.plan.costs.setup import Setup

# Launches of a layer forward: two norms, rotation, SwiGLU; four products; attention, and a
# copy of the values that it keeps. Backward: a norm's second launch adds the shares of its weight's gradient; each
# product has two; FlashAttention has three (row sums, the scores, dQ).
FORWARD = 4 + 4 + 1 + 1
BACKWARD = 6 + 8 + 3
NORM = 1, 2  # forward and backward
# More, where nothing is fused, in half precision: a norm whose weight has an offset (made float32, added to; its
# gradient rounded), GELU's gate beside SwiGLU's one, a residual that no norm adds, a sublayer's result multiplied.
OFFSET = 2, 1
GELU = 3, 7
ADD = 1, 1
MULTIPLY = 1, 1
# More, where a layer has experts (read off lumina.model.experts, not counted on a card): the router, its softmax, top k
# and sort, where each expert's rows end, there and back, the weighted sum; their gradients and the losses' sums.
EXPERTS = 20, 20
# More, where ranks share rows: q, k and v joined, two exchanges, the result laid out again; k and v repeated.
SHARED = 6, 6
# Of Llama's, in the second half of a layer, which tiles repeat: norm, SwiGLU and two products. More in a tile: its two
# results are put in place; backward its zero residual made and laid out, the gradient put in place, and those of a
# norm's and two matrices' weights added to the sums, which are rounded once.
FEED_FORWARD = 1 + 1 + 2, 2 + 1 + 4
TILE = 2, 6
SUMS = 3
# More, where a layer is recomputed: its input is summed before it, and in the place of its two results, the second
# time, is a number; where that input waits on the host it is copied there and back.
RECOMPUTED = 3
COPIED = 2
# More, of a group of heads: its result is put in place; backward its queries are projected and, with keys, rotated, its
# result and the result's gradient are laid out, and three gradients put in place. Attention and rotation, and what
# norms of queries and keys launch, are once for each group. Weights of these norms: two sums are begun and rounded.
GROUP = 1, 1 + 1 + 2 + 3
EACH = 1 + 1, 3 + 1
GROUP_SUMS = 4
TENSORS = 6  # weights of a layer, whose gradients are added or copied after a micro-batch

# Launches of a micro-batch outside the layers: ids to embedding, angles, last norm, rows of the loss; their gradients.
OUTSIDE = 8 + 8
CHUNK = 5  # of the output layer: logits, cross entropy, two products, the sum of losses
STEP = 40  # norm, clipping, update and copies of the weights: assumed, not counted


@dataclass(frozen=True)
class LaunchCost:
    """Seconds of host time for one layer, forward and backward.

    The figures are those of `python benchmarks/host_time.py` ("a layer") on one core of an Intel Xeon (family 6, model
    207, 2.3 GHz) that other work shared, torch 2.13.0, triton 3.9.0. Measure your own and give it: estimate-time
    --host-us F B.
    """

    forward: float = 353e-6
    backward: float = 487e-6

    @property
    def launch(self) -> float:
        """Seconds for one launch outside the layers."""
        return (self.forward + self.backward) / (FORWARD + BACKWARD)


def layer_launches(
    model: ModelConfig,
    recomputed: float = 0.0,
    shared: bool = False,
    tiles: int = 0,
    offloaded: bool = False,
    groups: int = 1,
) -> tuple[float, float]:
    """Launches of one layer, forward (the recomputed share of the layers twice) and backward. shared: ranks share
    rows. tiles: of tokens, in the feed-forward; 0: all at once. Their backward pass makes each tile again itself.
    offloaded: recomputed layers' inputs wait on the host. groups: of heads."""
    share = model.expert_layers / model.num_layers
    sequence, biased = int(shared), int(model.structure.qkv_bias)
    first, second = _unfused(model)
    half = [base + more for base, more in zip(FEED_FORWARD, second, strict=True)]
    forward = FORWARD - 1 + first[0] + second[0] + share * EXPERTS[0] + sequence * SHARED[0]
    backward = BACKWARD + first[1] + second[1] + share * EXPERTS[1] + sequence * SHARED[1] + biased
    copied = int(not shared and model.structure.qk_norm is None and groups == 1)  # the values, where there is a graph
    if groups > 1:
        more = _grouped(model, groups, sequence)
        forward, backward = forward + more[0], backward + more[1]
    around = recomputed * (RECOMPUTED + offloaded * COPIED) + copied
    if not tiles:
        return forward * (1 + recomputed) + around, backward
    post = int(model.structure.arrangement == "sandwich")  # a second norm in that half, whose gradient is added up too
    made = sum(half) + TILE[1] + post - int(model.structure.arrangement == "post-norm")  # whose sum takes any residual
    outside = (forward - half[0]) * (1 + recomputed) + 2 * recomputed  # the sum, and no result
    return (
        outside + around + tiles * (half[0] + TILE[0]),
        backward - half[1] + tiles * made + SUMS + post,
    )


def _grouped(model: ModelConfig, groups: int, shared: int) -> tuple[int, int]:
    """Launches of so many groups of heads, forward and backward, beside those of all at once."""
    norms = 2 if model.structure.qk_norm else 0
    way = [NORM[i] + (model.structure.norm_offset != 0) * OFFSET[i] for i in (0, 1)]
    forward = groups * GROUP[0] + (groups - 1) * (EACH[0] + norms * way[0] + shared * SHARED[0])
    backward = groups * (GROUP[1] + norms * (way[0] + 1) + shared * SHARED[0])  # what is made again; two sums
    backward += (groups - 1) * (EACH[1] + norms * way[1] + shared * SHARED[1]) + (GROUP_SUMS if norms else 0)
    return forward, backward


def _unfused(model: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """Launches, forward and backward, of a layer's first and second half that Llama's do not make; a multiplier, which
    is outside the tiles, is the first's."""
    structure = model.structure
    extra = int(structure.arrangement == "sandwich")
    norms = [len(model.norm_widths) - 1 - extra - 1, extra]  # beside one of each half
    found = []
    for half, more in enumerate(norms):
        counts = [0, 0]
        for way in (0, 1):
            counts[way] += more * NORM[way] + (structure.norm_offset != 0) * (more + 1) * OFFSET[way]
            counts[way] += (structure.arrangement == "post-norm") * ADD[way]
            counts[way] += half * (structure.activation != "silu") * GELU[way]
            counts[way] += (1 - half) * (model.residual_multiplier != 1.0) * 2 * MULTIPLY[way]
        found.append((counts[0], counts[1]))
    return found[0], found[1]


def host_seconds(model: ModelConfig, setup: Setup, recomputed: float, capacity: float, cost: LaunchCost) -> float:
    """Host time of one optimizer step. `recomputed`: share of the layers whose forward pass runs twice; `capacity`: the
    device's memory in bytes, which bounds the chunks of the output layer."""
    tokens = setup.tokens(model)
    tiles = -(-tokens // setup.mlp_tile) if setup.mlp_tile else 0
    forward, backward = layer_launches(
        model, recomputed, setup.sequence_parallel > 1, tiles, setup.activation_offloading, setup.head_groups
    )
    layer = forward * cost.forward / FORWARD + backward * cost.backward / BACKWARD
    rows = tokens * setup.supervised
    logits = rows * model.vocab_size * setup.element
    chunks = max(1, -(-logits // output_chunk_bytes(model.vocab_size, setup.element, capacity)))
    # Stages 2 and 3 copy each gradient into a bucket; 0 and 1 add it to those of the micro-batches before.
    handled = setup.accumulation if setup.stage >= 2 else setup.accumulation - 1
    others = setup.accumulation * (OUTSIDE + CHUNK * chunks) + handled * TENSORS * model.num_layers + STEP
    return setup.accumulation * model.num_layers * layer + others * cost.launch
