"""`lumina plan`: the fastest way that fits, why not another, what else stands out, and the files to start it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lumina.config import Config, UserError
from lumina.config.deepspeed import AUTO, resolve
from lumina.plan.costs.devices import Cluster
from lumina.plan.costs.setup import Data
from lumina.plan.estimate import TOKENS_PER_PARAMETER, estimate_setup
from lumina.plan.estimate_report import choose_clusters, gather_data, model_lines, run_lines, whole_groups
from lumina.plan.search import NOISE, Candidate, buffers_for, choose, search
from lumina.terminal import say

FEW, MANY = TOKENS_PER_PARAMETER / 4, TOKENS_PER_PARAMETER * 10


def print_plan(config: Config, arguments: argparse.Namespace) -> int:
    """Print the plan, write it if asked; 0 when something fits."""
    if not arguments.gpu:
        raise UserError("which GPU to plan for?", "Give --gpu, and --nodes and --gpus-per-node.")
    if config.ds_config:
        raise UserError("a plan chooses the DeepSpeed JSON itself", "Leave out --ds_config; see estimate-time for one.")
    (cluster,), _ = choose_clusters(arguments)
    whole_groups(config, cluster)
    data = gather_data(config, arguments)
    resolved = resolve(config, cluster.world_size, "cuda", bf16_supported="bf16" in cluster.device.peak).config
    batch = resolved.global_batch_size
    assert batch is not None
    stages = (0, 1, 2, 3) if arguments.zero is None else (arguments.zero,)
    found = search(config, cluster, data, batch, resolved.precision, stages, arguments.quantized_weights)
    best = choose(found, cluster)
    if best is not None:
        config = config.replace(sequence_parallel_size=best.setup.sequence_parallel)
    remarks = remarks_on(config, cluster, data, batch, best)
    files = write(Path(arguments.write), config, cluster, best, batch) if arguments.write and best else []
    if arguments.json:
        say(json.dumps(as_dict(cluster, best, found, remarks, files)))
    else:
        say("\n".join(model_lines(config, data)))
        say("\n" + "\n".join(chosen_lines(config, cluster, data, batch, best, arguments.price)))
        say("\n" + "\n".join([*reasons(found, best), *remarks]))
        for file in files:
            say(f"wrote {file}")
    return 0 if best else 1


def chosen_lines(
    config: Config, cluster: Cluster, data: Data, batch: int, best: Candidate | None, price: float | None
) -> list[str]:
    """The winner as estimate-time would show it."""
    if best is None:
        left = {"what shares rows or tiles": config.untiled, "groups of heads": config.ungrouped}
        untried = "".join(f"; {way} not tried, for {', '.join(names)}" for way, names in left.items() if names)
        return [f"nothing fits on {cluster}: more or larger GPUs, a shorter context or a smaller model would{untried}"]
    return run_lines(config, estimate_setup(config, best.setup, buffers_for(config), cluster, data, batch), price)


def reasons(found: list[Candidate], best: Candidate | None) -> list[str]:
    """For every stage and offload the best that fits and how far behind it is, or how much the leanest one lacks; and
    the same for every other way to bring activations down."""
    same = [candidate for candidate in found if best is None or candidate.way == best.way]
    lines = []
    for strategy in dict.fromkeys(sorted(candidate.strategy for candidate in same)):
        members = [candidate for candidate in same if candidate.strategy == strategy]
        is_best = best is not None and strategy == best.strategy
        lines.append(f"{strategy}: {_verdict(members, best, is_best)}")
    ways = dict.fromkeys(candidate.way for candidate in sorted(found, key=lambda candidate: candidate.way))
    for way in ways if len(ways) > 1 else ():
        members = [candidate for candidate in found if candidate.way == way]
        lines.append(f"{_describe_way(way)}: {_verdict(members, best, best is not None and way == best.way)}")
    return lines


def _verdict(members: list[Candidate], best: Candidate | None, chosen: bool) -> str:
    """What became of these, fastest first. chosen: whether the best is of them."""
    fitting = next((candidate for candidate in members if candidate.fits), None)
    if fitting is None:
        leanest = min(members, key=lambda candidate: candidate.memory.device)
        return f"does not fit, {leanest.memory.device / 1e9:.1f} GB at the least"
    assert best is not None
    if chosen:
        return f"chosen ({describe(best)})"
    behind = 1 - fitting.rate / best.rate
    how = f"{behind:.1%} slower" if behind > NOISE else f"within {NOISE:.0%}, but less simple"
    return f"{how} ({describe(fitting)})"


def _describe_way(way: tuple[int, bool, bool, bool]) -> str:
    """`rows shared by 4 ranks, tiles, groups of heads, activations on the host`."""
    shared, tiles, grouped, offloaded = way
    parts = [f"rows shared by {shared} ranks" if shared > 1 else "rows not shared"]
    parts += ["tiles"] if tiles else []
    parts += ["groups of heads"] if grouped else []
    parts += ["activations on the host"] if offloaded else []
    return ", ".join(parts)


def describe(candidate: Candidate) -> str:
    """Micro-batch, accumulation, recomputation, tiles and memory in a few words."""
    setup, memory = candidate.setup, candidate.memory
    every = {0: "nothing recomputed", 1: "every layer recomputed"}.get(
        setup.checkpoint_every, f"every {setup.checkpoint_every}. layer recomputed"
    )
    parts = [f"micro-batch {setup.micro_batch} x {setup.accumulation}", every]
    parts += [f"tiles of {setup.mlp_tile:,} tokens"] if setup.mlp_tile else []
    parts += [f"heads in {setup.head_groups} groups"] if setup.head_groups > 1 else []
    on_host = f" and {memory.host / 1e9:.1f} GB of each rank on the host" if memory.host else ""
    return ", ".join(parts) + f", {memory.device / 1e9:.1f} GB{on_host}"


def remarks_on(config: Config, cluster: Cluster, data: Data, batch: int, best: Candidate | None) -> list[str]:
    """Where the model is the wrong size for the data, or the batch for the cluster, and what the hosts must have."""
    remarks = []
    ratio = data.tokens * config.epochs / config.num_parameters(active=True)
    if ratio < FEW:
        remarks.append(
            f"{ratio:.1f} tokens per parameter over all epochs: the model is large for this data; about "
            f"{TOKENS_PER_PARAMETER} is where a smaller one would do as well (arXiv:2203.15556)"
        )
    elif ratio > MANY:
        remarks.append(f"{ratio:,.0f} tokens per parameter: a larger model would learn more from this data")
    groups = cluster.world_size // config.sequence_parallel_size
    if batch < groups:
        kind = "ranks" if groups == cluster.world_size else "groups of ranks"
        remarks.append(
            f"{groups} {kind} for {batch} samples a step: {groups - batch} only pad. "
            "Fewer GPUs, or a larger --global-batch-size"
        )
    if best is not None and best.memory.host:
        needed = best.memory.host * min(cluster.gpus_per_node, cluster.world_size) / 1e9
        remarks.append(f"each node needs {needed:,.0f} GB of memory for what is on the host, which is not checked")
    return remarks


def ds_document(best: Candidate) -> dict[str, Any]:
    """A plain DeepSpeed JSON for the chosen way; Lumina fills the rest as always."""
    setup = best.setup
    zero: dict[str, Any] = {"stage": setup.stage}
    if setup.stage:
        zero |= {"overlap_comm": AUTO, "contiguous_gradients": True, "reduce_bucket_size": AUTO}
    if setup.stage == 3:
        zero |= {"stage3_prefetch_bucket_size": AUTO, "stage3_param_persistence_threshold": AUTO}
        zero |= {"stage3_max_live_parameters": AUTO, "stage3_max_reuse_distance": AUTO}
    if setup.hpz:
        zero["zero_hpz_partition_size"] = setup.hpz
    if setup.quantized_weights:
        zero["zero_quantized_weights"] = True
    if setup.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if setup.offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {
        **{key: AUTO for key in batches},
        "gradient_clipping": AUTO,
        "bf16": {"enabled": AUTO},
        "fp16": {"enabled": AUTO},
        "zero_optimization": zero,
    }


def write(folder: Path, config: Config, cluster: Cluster, best: Candidate, batch: int) -> list[str]:
    """config.yaml, ds_config.json, hostfile and train.sbatch; returns their paths."""
    setup = best.setup
    chosen = config.replace(
        batch_size=setup.micro_batch,
        gradient_accumulation_steps=setup.accumulation,
        global_batch_size=batch,
        precision=setup.precision,
        gradient_checkpointing=setup.checkpoint_every if setup.checkpoint_every > 1 else bool(setup.checkpoint_every),
        sequence_parallel_size=setup.sequence_parallel,
        mlp_tile_tokens=setup.mlp_tile or None,
        attention_head_groups=setup.head_groups,
        activation_offloading=setup.activation_offloading,  # where nothing is recomputed there is none
    )
    hosts = "".join(f"node{number} slots={cluster.gpus_per_node}\n" for number in range(1, cluster.nodes + 1))
    contents = {
        "config.yaml": chosen.to_yaml(),
        "ds_config.json": json.dumps(ds_document(best), indent=2) + "\n",
        "hostfile": hosts,
        "train.sbatch": SBATCH.format(
            name=config.experiment_name, nodes=cluster.nodes, each=cluster.gpus_per_node, folder=folder
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [str(folder / name) for name in contents]


SBATCH = """\
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={each}
#SBATCH --gpus-per-node={each}
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output={folder}/%j.log
# From Lumina's own folder: sbatch {folder}/train.sbatch --train-data FILE. launchers/train.sbatch says what happens.
cd "${{SLURM_SUBMIT_DIR:-.}}"
exec bash launchers/train.sbatch --config {folder}/config.yaml --ds_config {folder}/ds_config.json "$@"
"""


def as_dict(
    cluster: Cluster, best: Candidate | None, found: list[Candidate], remarks: list[str], files: list[str]
) -> dict[str, Any]:
    """The plan for --json."""

    def one(candidate: Candidate) -> dict[str, Any]:
        return {
            "family": candidate.strategy,
            "shape": asdict(candidate.setup),
            "memory": candidate.memory.device,
            "tokens_per_second": candidate.rate,
            "fits": candidate.fits,
        }

    fitting = [candidate for candidate in found if candidate.fits]
    return {
        "cluster": {"device": cluster.device.name, "nodes": cluster.nodes, "gpus_per_node": cluster.gpus_per_node},
        "best": one(best) if best else None,
        "fitting": len(fitting),
        "tried": len(found),
        "ranking": [one(candidate) for candidate in fitting[:20]],
        "remarks": remarks,
        "files": files,
    }
