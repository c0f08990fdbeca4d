"""Speed model: the time of a step on a cluster, from the counted work and the device's sourced rates.

    compute  = products / (peak * share reached) + element-wise bytes / bandwidth
    exposed  = communication that the stage cannot hide behind compute, exchanges, and copies of activations to the host
    device   = accumulation * compute + optimizer
    step     = max(device, host) + exposed          host: the time to queue it all (lumina.plan.costs.launches)

Lumina's element-wise kernels are fused; `elementwise_factor` says how many times more bytes another implementation
moves, `attention` overrides the share its attention kernel reaches, and `values_copied` says whether it makes Lumina's
copy of attention's values, so that published runs of other trainers can be predicted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lumina.config import ModelConfig, UserError
from lumina.plan.costs.activations import offloaded_bytes
from lumina.plan.costs.devices import Cluster
from lumina.plan.costs.launches import host_seconds
from lumina.plan.costs.setup import Setup
from lumina.plan.costs.workload import (
    Flops,
    Traffic,
    feed_forward_width,
    flops_per_token,
    memory_bytes_per_token,
    optimizer_bytes,
    recomputed_share,
    traffic,
)

# Assumptions, not measurements; the comparison in docs/plan.md covers the first two, nothing covers the host's.
STREAM = 0.85  # share of memory bandwidth that element-wise kernels reach
COLLECTIVE = 0.80  # share of a link that NCCL's collectives reach for large messages
HOST_LINK = 25e9  # bytes/s between GPU and host (PCIe 4.0 x16 is 32e9 each way)
HOST_ADAM = 1e9  # parameters/s that DeepSpeed's CPU Adam updates on a server


@dataclass(frozen=True)
class Speed:
    """One step's time in seconds, by part, and the rates that follow."""

    products: float
    elementwise: float
    optimizer: float
    communication: float  # all of it
    exposed: float  # what is not hidden behind compute, copies included
    exchange: float  # of the communication, between ranks that share rows
    copies: float  # of what is exposed: inputs of recomputed layers on their way to the host and back
    host: float  # to queue the step's kernels; the device waits where it is longer than the device's own time
    step: float
    tokens_per_step: float
    flops: Flops
    traffic: Traffic
    mfu: float

    @property
    def host_bound(self) -> bool:
        """Whether the device waits for launches."""
        return self.host > self.products + self.elementwise + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step

    def of_batch(self, samples: int, setup: Setup) -> Speed:
        """The same of a global batch of so many samples, which the ranks fill up with padding of weight zero where they
        do not divide it: that takes its time and is no progress."""
        share = samples / (setup.micro_batch * setup.accumulation * setup.groups)
        return replace(self, tokens_per_step=self.tokens_per_step * share, mfu=self.mfu * share)


def predict(
    model: ModelConfig,
    setup: Setup,
    cluster: Cluster,
    *,
    elementwise_factor: float = 1.0,
    attention: float | None = None,
    values_copied: bool = True,
) -> Speed:
    """The speed of one step. UserError where the device lacks the precision or its network is not known."""
    device = cluster.device
    if setup.precision not in device.peak:
        raise UserError(f"{device.name} has no {setup.precision}", f"It has {', '.join(device.peak)}.")
    tokens = setup.tokens(model)
    flops = flops_per_token(model, setup)
    again = recomputed_share(model, setup)
    peak = device.peak[setup.precision]
    matrix = flops.layers * (3 + again) + flops.output * 3
    if setup.mlp_tile:  # computed once more in the backward pass of layers that are not recomputed whole
        matrix += (1 - again) * 6 * model.num_layers * model.hidden_size * feed_forward_width(model)
    if setup.head_groups > 1:  # queries are projected anew in the backward pass
        matrix += 2 * model.num_layers * model.hidden_size * model.num_heads * model.head_dim
    scores = flops.attention * (3.5 + again) / (attention or device.attention)
    products = setup.accumulation * tokens * (matrix / device.matmul + scores) / peak
    stream = device.bandwidth * STREAM
    moved_per_token = elementwise_factor * memory_bytes_per_token(model, setup, values_copied)
    elementwise = setup.accumulation * tokens * moved_per_token / stream
    optimizer = optimizer_seconds(model, setup, stream)
    moved = traffic(model, setup)
    communication = 0.0
    if setup.world > 1:
        communication = (moved.gradients + moved.weights) / link_rate(cluster) + moved.near / inside_rate(cluster)
    # Exchanges stand between matrix products that need what they bring: nothing hides them.
    exchange = exchange_seconds(setup, moved, cluster)
    exposed = _exposed(setup, moved, products + elementwise, communication) + exchange
    copies = _exposed_copies(model, setup, products + elementwise)
    exposed += copies
    queued = host_seconds(model, setup, again, device.memory, cluster.launch_cost)
    step = max(products + elementwise + optimizer, queued) + exposed
    total = setup.useful_tokens(model)
    mfu = flops.model * total / (step * cluster.world_size * device.peak[setup.precision])
    communication += exchange
    return Speed(
        products=products,
        elementwise=elementwise,
        optimizer=optimizer,
        communication=communication,
        exposed=exposed,
        exchange=exchange,
        copies=copies,
        host=queued,
        step=step,
        tokens_per_step=total,
        flops=flops,
        traffic=moved,
        mfu=mfu,
    )


def optimizer_seconds(model: ModelConfig, setup: Setup, stream: float) -> float:
    """The update itself: on the device, or on the host with gradients going there and weights coming back."""
    if not setup.offload_optimizer:
        return optimizer_bytes(model, setup) / stream
    own = model.num_parameters() / (setup.world if setup.stage else 1)
    return own / HOST_ADAM + 2 * own * setup.element / HOST_LINK


def link_rate(cluster: Cluster) -> float:
    """Bytes/s at which a rank receives in collectives over the whole cluster: the slower of the links inside a node and
    the network, which carries a share (nodes - 1) / nodes of the bytes over all of a node's adapters at once."""
    device = cluster.device
    if cluster.nodes == 1:
        return inside_rate(cluster)
    if device.network is None:
        raise _unknown_network(cluster)
    # All ranks of a node need the same bytes from outside once; the node's adapters bring them in together.
    world, nodes, each = cluster.world_size, cluster.nodes, cluster.gpus_per_node
    crossing = ((nodes - 1) / nodes) / ((world - 1) / world)
    outside = device.network * COLLECTIVE * each / crossing
    return min(inside_rate(cluster), outside)


def inside_rate(cluster: Cluster) -> float:
    """Bytes/s at which a rank receives in collectives within its node."""
    return cluster.device.link * COLLECTIVE


def exchange_seconds(setup: Setup, moved: Traffic, cluster: Cluster) -> float:
    """Time of a step's exchanges between ranks that share rows. Those of other nodes send through this rank's own
    adapter; they are the fewest where the size of a group divides that of a node, or the other way round."""
    if not moved.exchanged:
        return 0.0
    size = setup.sequence_parallel
    near = math.gcd(size, cluster.gpus_per_node)
    far = (size - near) / (size - 1)
    inside = moved.exchanged * (1 - far) / inside_rate(cluster)
    if not far:
        return inside
    if cluster.device.network is None:
        raise _unknown_network(cluster)
    return max(inside, moved.exchanged * far / (cluster.device.network * COLLECTIVE))


def _exposed_copies(model: ModelConfig, setup: Setup, compute: float) -> float:
    """Recomputed layers' inputs go to the host beside the forward pass, a third of what is computed once, and come back
    beside the backward pass and its recomputation."""
    one_way = setup.accumulation * offloaded_bytes(model, setup) / HOST_LINK
    forward = compute / (3 + recomputed_share(model, setup))
    return max(0.0, one_way - forward) + max(0.0, one_way - (compute - forward))


def _unknown_network(cluster: Cluster) -> UserError:
    return UserError(
        f"the network of nodes with {cluster.device.name} is not known", "Estimate one node, or --measure there."
    )


def _exposed(setup: Setup, moved: Traffic, compute: float, communication: float) -> float:
    """Gradients are reduced during the backward pass (two thirds of compute) of the micro-batches that reduce, but for
    the last bucket of each, and none under stage 0, where DeepSpeed reduces when the backward pass has ended; gathered
    weights of stage 3 hide behind any compute; those of stages 1 and 2 come after the update, where nothing runs."""
    if not communication:
        return 0.0
    per_byte = communication / moved.of_weights
    if setup.stage == 3:
        return max(0.0, communication - compute)
    gradients, weights = moved.gradients * per_byte, moved.weights * per_byte
    if setup.stage == 0 or not setup.overlap:
        return gradients + weights
    reducing = 1 if setup.stage < 2 else setup.accumulation
    backward = compute * 2 / 3 * reducing / setup.accumulation
    each = 1 if setup.reduce_scatter else 2
    tails = min(gradients, reducing * each * setup.bucket * setup.element * per_byte)
    return max(tails, gradients - backward) + weights
