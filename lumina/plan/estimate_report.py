"""`lumina estimate-time`: which cluster, which data, and the estimate as text for a reader or as one JSON object."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

from lumina.config import Config, UserError
from lumina.config.deepspeed import default_json
from lumina.plan.costs import host_memory
from lumina.plan.costs.devices import Cluster, find_device, local_device
from lumina.plan.costs.launches import LaunchCost
from lumina.plan.costs.memory import PARTS, peak_memory
from lumina.plan.costs.setup import Data, Setup
from lumina.plan.costs.workload import flops_per_token
from lumina.plan.estimate import RunEstimate, assumed_data, data_of_files, estimate_run, total_steps
from lumina.plan.search import buffers_for
from lumina.terminal import say

REFERENCE = ("a100-80gb", "h100")  # shown where no GPU is named and none is here


def print_estimate(config: Config, arguments: argparse.Namespace) -> int:
    """Print the estimate; 0 if the run fits on every cluster that was asked for, else 1."""
    data = gather_data(config, arguments)
    if arguments.measure:
        return measured_estimate(config, data, arguments)
    clusters, note = choose_clusters(arguments)
    for cluster in clusters:
        whole_groups(config, cluster)
    document = stage_document(config, arguments.zero)
    estimates = [estimate_run(config, cluster, data, document) for cluster in clusters]
    if arguments.json:
        runs = [as_dict(config, each, arguments.price) for each in estimates]
        say(json.dumps({"model": model_dict(config, data), "data": asdict(data), "runs": runs}))
    else:
        say("\n".join(model_lines(config, data)))
        if note:
            say(note)
        for each in estimates:
            say("\n".join(["", *run_lines(config, each, arguments.price)]))
    return 0 if all(each.fits for each in estimates) else 1


def measured_estimate(config: Config, data: Data, arguments: argparse.Namespace) -> int:
    """The same question answered by timing real steps on this machine."""
    from lumina.plan.measure import measure, usable_processes

    if arguments.nodes > 1 or arguments.gpu:
        raise UserError("--measure times this machine only", "Leave out --nodes and --gpu.")
    found = measure(config, usable_processes(arguments.gpus_per_node), arguments.document_tokens, data.supervised)
    steps = total_steps(config, data, found.global_batch)
    seconds = steps * found.seconds
    if arguments.json:
        run = asdict(found) | {"tokens_per_second": found.tokens_per_second, "run_steps": steps, "run_seconds": seconds}
        say(json.dumps({"model": model_dict(config, data), "data": asdict(data), "measured": run}))
        return 0
    say("\n".join(model_lines(config, data)))
    say(
        f"\nmeasured here: {found.processes} process(es), {found.steps} steps of {found.global_batch} samples\n"
        f"  step      {_time(found.seconds)} (spread {found.spread:.0%}), {found.tokens_per_second:,.0f} tokens/s\n"
        f"  memory    {_size(found.memory)} in the first process\n"
        f"  run       {steps:,} steps: {_duration(seconds)} (how far off that may be: docs/plan.md)"
    )
    return 0


def gather_data(config: Config, arguments: argparse.Namespace) -> Data:
    """Counted from the training data where there are some, else what the options say."""
    if config.train_data or config.data:
        return data_of_files(config)
    return assumed_data(config, arguments.tokens, arguments.document_tokens, arguments.supervised)


def choose_clusters(arguments: argparse.Namespace) -> tuple[list[Cluster], str]:
    """The clusters to estimate, and a line that says why these."""
    names = [arguments.gpu] if arguments.gpu else []
    note = ""
    devices = [find_device(name) for name in names]
    if not devices:
        here = local_device()
        devices = [here] if here else [find_device(name) for name in REFERENCE]
        if not here:
            note = f"no --gpu given and none that is known here: shown for {' and '.join(REFERENCE)}"
    cost = LaunchCost(*(1e-6 * each for each in arguments.host_us)) if arguments.host_us else LaunchCost()
    return [Cluster(device, arguments.nodes, arguments.gpus_per_node, cost) for device in devices], note


def whole_groups(config: Config, cluster: Cluster) -> None:
    """UserError where the cluster's ranks do not make whole groups of those that share rows."""
    size, world = config.sequence_parallel_size, cluster.world_size
    if world % size:
        raise UserError(
            f"sequence_parallel_size {size} does not divide the number of GPUs, {world}",
            f"Name {size} GPUs or a multiple (--nodes, --gpus-per-node), or set it to a divisor of {world}.",
        )


def stage_document(config: Config, stage: int | None) -> dict[str, Any] | None:
    """The built-in DeepSpeed JSON with the stage of --zero; None where that was not given."""
    if stage is None:
        return None
    if config.ds_config:
        raise UserError("--zero and --ds_config both choose the ZeRO stage", "Give one of them.")
    document = default_json(2)
    document["zero_optimization"]["stage"] = stage
    return document


def model_dict(config: Config, data: Data) -> dict[str, Any]:
    """The part that no cluster changes."""
    setup = _any_setup(data)
    flops = flops_per_token(config, setup)
    return {
        "name": config.model_name,
        "parameters": config.num_parameters(),
        "parameters_without_embeddings": config.num_parameters(False),
        "active_parameters": config.num_parameters(active=True),
        "sequence_length": config.seq_length,
        "flops_per_token": {
            "layers": 3 * flops.layers,
            "attention": 3 * flops.attention,
            "output": 3 * flops.output,
            "total": flops.model,
        },
    }


def as_dict(config: Config, each: RunEstimate, price: float | None) -> dict[str, Any]:
    """One estimate for --json; sizes in bytes, times in seconds."""
    speed, memory = each.speed, each.memory
    return {
        "cluster": {
            "device": each.cluster.device.name,
            "nodes": each.cluster.nodes,
            "gpus_per_node": each.cluster.gpus_per_node,
            "sources": each.cluster.device.sources,
        },
        "shape": asdict(each.setup),
        "global_batch_size": each.global_batch,
        "fits": each.fits,
        "memory": {part: getattr(memory, part) for part in PARTS}
        | {"total": memory.device, "host": memory.host, "device": each.cluster.device.memory, "peak_at": memory.moment},
        "host_memory": {
            "start": host_memory.start(config, each.setup),
            "snapshot": host_memory.snapshot(config, each.setup),
        },
        "memory_by_stage": by_stage(config, each),
        "communication": {
            "gradients": speed.traffic.gradients,
            "weights": speed.traffic.weights,
            "weights_within_nodes": speed.traffic.near,
            "exchanged": speed.traffic.exchanged,
        },
        "step": {
            "products": speed.products,
            "elementwise": speed.elementwise,
            "optimizer": speed.optimizer,
            "communication": speed.communication,
            "exchange": speed.exchange,
            "exposed_communication": speed.exposed - speed.copies,
            "exposed_copies": speed.copies,
            "host": speed.host,
            "total": speed.step,
        },
        "tokens_per_second": speed.tokens_per_second,
        "uncertainty": each.cluster.device.uncertainty,
        "mfu": speed.mfu,
        "steps": each.steps,
        "seconds": each.seconds,
        "gpu_hours": each.gpu_hours,
        "energy_kwh": each.energy_kwh,
        "cost": None if price is None else price * each.gpu_hours,
    }


def by_stage(config: Config, each: RunEstimate) -> dict[str, float]:
    """Peak bytes of a rank under every ZeRO stage, and with offload, at the same batch."""
    plain = replace(each.setup, hpz=0, offload_optimizer=False, offload_params=False)
    capacity = each.cluster.device.memory
    totals = {f"zero{stage}": _peak(config, replace(plain, stage=stage), capacity) for stage in range(4)}
    offloaded = replace(plain, stage=3, offload_optimizer=True, offload_params=True)
    totals["zero3_offload"] = _peak(config, offloaded, capacity)
    return totals


def _peak(config: Config, setup: Setup, capacity: float) -> float:
    return peak_memory(config, setup, buffers_for(config), capacity).device


def model_lines(config: Config, data: Data) -> list[str]:
    """The model and the data as text."""
    model = model_dict(config, data)
    flops = model["flops_per_token"]
    shares = ", ".join(f"{part} {flops[part] / flops['total']:.0%}" for part in ("layers", "attention", "output"))
    documents = f", documents of {data.document_tokens:,.0f}" if data.document_tokens else ""
    active = f"{model['active_parameters'] / 1e6:,.1f} M active, " if config.experts is not None else ""
    return [
        f"{config.model_name}: {model['parameters'] / 1e6:,.1f} M parameters "
        f"({active}{model['parameters_without_embeddings'] / 1e6:,.1f} M without embeddings), "
        f"context {config.seq_length:,}",
        f"work: {flops['total'] / 1e9:.2f} GFLOP per token, forward and backward ({shares})",
        f"data: {data.tokens / 1e6:,.1f} M tokens an epoch ({data.source}){documents}, "
        f"{data.supervised:.0%} supervised, samples {data.fill:.1%} full",
    ]


def run_lines(config: Config, each: RunEstimate, price: float | None) -> list[str]:
    """One estimate as text."""
    setup, memory, speed = each.setup, each.memory, each.speed
    capacity = each.cluster.device.memory
    offload = " with offload" if setup.offload_optimizer else ""
    layers = f", every {setup.checkpoint_every}. layer recomputed" if setup.checkpoint_every > 1 else ""
    layers = ", every layer recomputed" if setup.checkpoint_every == 1 else layers
    layers += f", tiles of {setup.mlp_tile:,} tokens" if setup.mlp_tile else ""
    layers += f", heads in {setup.head_groups} groups" if setup.head_groups > 1 else ""
    layers += ", activations on the host" if setup.activation_offloading else ""
    parts = ", ".join(f"{part} {_size(getattr(memory, part))}" for part in PARTS if getattr(memory, part))
    stages = ", ".join(f"{name} {_size(total)}" for name, total in by_stage(config, each).items())
    within = each.cluster.device.uncertainty
    low, high = (each.seconds * factor for factor in (1 / (1 + within), 1 / (1 - within)))
    ranks = f"{setup.world} ranks"
    if setup.sequence_parallel > 1:
        ranks = f"{setup.groups} group(s) of {setup.sequence_parallel} ranks"
    lines = [
        f"{each.cluster}: {setup.precision}, ZeRO {setup.stage}{offload}{layers}; {setup.micro_batch} per micro-batch "
        f"x {setup.accumulation} x {ranks} = {each.global_batch} samples a step",
        f"  memory    {_size(memory.device)} of {_size(capacity)} at the {memory.moment}: "
        f"{'fits' if each.fits else 'DOES NOT FIT'}",
        f"            {parts}",
        f"  host      of each rank: {_size(host_memory.start(config, setup))} at the start, "
        f"{_size(host_memory.snapshot(config, setup))} for snapshots"
        + (f", {_size(memory.host)} of what is offloaded" if memory.host else ""),
        f"  by stage  {stages}",
        f"  step      {_time(speed.step)}: matrix products {_time(speed.products)}, element-wise "
        f"{_time(speed.elementwise)}, optimizer {_time(speed.optimizer)}, network not hidden "
        f"{_time(speed.exposed - speed.copies)}"
        + (f" (attention's exchanges {_time(speed.exchange)})" if speed.exchange else "")
        + (f", copies to the host and back not hidden {_time(speed.copies)}" if speed.copies else "")
        + f"; the host needs {_time(speed.host)} to queue it"
        + (", and the GPU waits for it" if speed.host_bound else ""),
        f"  network   {_size(speed.traffic.total)} received by each rank a step: gradients "
        f"{_size(speed.traffic.gradients)}, weights {_size(speed.traffic.weights)}"
        + (f", weights within a node {_size(speed.traffic.near)}" if speed.traffic.near else "")
        + (f", exchanged for attention {_size(speed.traffic.exchanged)}" if speed.traffic.exchanged else ""),
        f"  speed     {speed.tokens_per_second:,.0f} tokens/s, MFU {speed.mfu:.1%} (within {within:.0%})",
        f"  run       {each.steps:,} steps: {_duration(each.seconds)} (between {_duration(low)} and {_duration(high)})"
        f", {each.gpu_hours:,.1f} GPU-hours, {each.energy_kwh:,.1f} kWh"
        + (f", {price * each.gpu_hours:,.2f} USD" if price is not None else ""),
        f"  figures   {'; '.join(dict.fromkeys(each.cluster.device.sources))}",
    ]
    return lines


def _any_setup(data: Data) -> Setup:
    return Setup(1, 1, 1, "bf16", document_tokens=data.document_tokens, supervised=data.supervised, fill=data.fill)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
