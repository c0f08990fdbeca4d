"""The training state as named fragments: what each rank holds of every parameter's float32 weights and optimizer state.

DeepSpeed keeps this state in a different shape under each ZeRO stage. Here each stage is read as the same thing: for
every parameter, the range [start, start + numel) of its flattened elements that this rank owns, as writable views. A
checkpoint of fragments can therefore be loaded at another world size or under another stage: a rank reads the ranges it
owns from whichever files hold them.

Frozen weights (those under adapters, lumina.model.lora) have no optimizer state and are no part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lumina.checkpoint import MASTER
from lumina.config import UserError
from lumina.train.deepspeed.engine import Engine
from lumina.train.deepspeed.partitioned_init import drop_secondary_copy, whole_numel
from lumina.train.deepspeed.surface import Wrapper


@dataclass
class Fragment:
    """One parameter's range on this rank. `owner` is the tensor that the optimizer updates, of which it is
    `owner.flatten()[offset : offset + numel]`; `start` counts in the parameter's own elements."""

    name: str
    start: int
    numel: int
    owner: Tensor
    offset: int

    def view(self, tensor: Tensor) -> Tensor:
        """This fragment's part of a tensor shaped like its owner (the weights or a moment)."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def owned_fragments(engine: Engine) -> list[Fragment]:
    """Every fragment this rank owns. Together the ranks' fragments cover each trained parameter exactly once, except
    that ranks of stage 0 all hold everything and each names its equal share."""
    names = {id(p): name for name, p in engine.model.named_parameters()}
    found = list(_by_stage(engine, names))
    return [f for f in found if f.numel > 0]


def _by_stage(engine: Engine, names: dict[int, str]) -> Iterator[Fragment]:
    wrapped = engine.wrapped
    match engine.wrapper:
        case Wrapper.ZERO_3:
            yield from _stage3(wrapped, names)
        case Wrapper.ZERO_1_2:
            yield from _partitioned(wrapped.bit16_groups, wrapped.single_partition_of_fp32_groups, names)
        case Wrapper.BF16:
            yield from _partitioned(wrapped.bf16_groups, wrapped.fp32_groups_flat_partition, names)
        case Wrapper.HALF | Wrapper.NONE:
            yield from _replicated(engine, names)


def _partitioned(groups: list[list[Tensor]], flats: list[Tensor], names: dict[int, str]) -> Iterator[Fragment]:
    for group, flat in zip(groups, flats, strict=True):
        for parameter in group:
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Fragment(names[id(parameter)], low.start, high.numel, flat, high.start)


def _stage3(wrapped: Any, names: dict[int, str]) -> Iterator[Fragment]:
    # Not by deepspeed.utils.safe_get_local_fp32_param: under offload it returns a copy on the device, and what is
    # loaded must be written into the tensor that the optimizer updates.
    if any(flat is None for flat in wrapped.fp16_partitioned_groups_flat) or wrapped.swap_optimizer:
        raise UserError(
            "checkpoints of state offloaded to NVMe are not supported",
            'Use "offload_optimizer": {"device": "cpu"} in the DeepSpeed configuration.',
        )
    rank = torch.distributed.get_rank(wrapped.dp_process_group)
    for group in wrapped.fp16_groups:
        for parameter in group:
            index, offset, size = wrapped.grad_position[wrapped.get_param_id(parameter)]
            start = rank * size
            numel = min(size, parameter.ds_numel - start)  # the last rank's share ends in padding
            yield Fragment(names[id(parameter)], start, numel, wrapped.fp32_partitioned_groups_flat[index], int(offset))


def _replicated(engine: Engine, names: dict[int, str]) -> Iterator[Fragment]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def share(name: str, owner: Tensor, numel: int) -> Fragment:
        start = numel * rank // world
        return Fragment(name, start, numel * (rank + 1) // world - start, owner, start)

    if engine.wrapper is Wrapper.HALF:  # one float32 copy per parameter
        for group, masters in zip(engine.wrapped.weight_groups, engine.wrapped.master_groups, strict=True):
            for parameter, master in zip(group, masters, strict=True):
                yield share(names[id(parameter)], master, parameter.numel())
    else:  # float32: the parameter itself
        for parameter in engine.model.parameters():
            if parameter.requires_grad:
                yield share(names[id(parameter)], parameter, parameter.numel())


def fragments_to_load(engine: Engine) -> list[Fragment]:
    """The ranges this rank must read from a checkpoint: its fragments, but all of every parameter under stage 0."""
    if engine.stage != 0:
        return owned_fragments(engine)
    names = {id(p): name for name, p in engine.model.named_parameters()}
    sizes = {name: p.numel() for name, p in engine.model.named_parameters()}
    fragments = _replicated(engine, names)
    return [Fragment(f.name, 0, sizes[f.name], f.owner, f.offset - f.start) for f in fragments]


# --- Optimizer state ------------------------------------------------------------------------------


def moments(engine: Engine, fragment: Fragment) -> dict[str, Tensor]:
    """The optimizer's per-element states of a fragment by name (exp_avg, exp_avg_sq for Adam)."""
    state = engine.optimizer.state.get(fragment.owner, {})
    return {
        key: fragment.view(value)
        for key, value in state.items()
        if isinstance(value, Tensor) and value.numel() == fragment.owner.numel() and value.dim() > 0
    }


def step_count(engine: Engine) -> int:
    """How many updates the optimizer has made: Adam's bias correction depends on it. On a GPU this waits for them."""
    return int(raw_step_count(engine))


def raw_step_count(engine: Engine) -> Tensor | int:
    """The same as the optimizer keeps it: a number, or a scalar on the device."""
    for state in engine.optimizer.state.values():
        if "step" in state:
            steps: Tensor | int = state["step"]
            return steps
    return 0


def init_optimizer_state(engine: Engine, keys: list[str], step: int) -> None:
    """Create the optimizer state that a checkpoint names, before its values are read into it."""
    torch_optimizer = isinstance(engine.optimizer, torch.optim.AdamW)
    if not keys:  # saved before any was allocated: the optimizer starts afresh
        for state in engine.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
            state["step"] = state["step"] if isinstance(state["step"], Tensor) else 0
        return
    if engine.wrapper is Wrapper.HALF:
        engine.wrapped.load_step(step)
        return
    for owner in _owners(engine):
        state = engine.optimizer.state[owner]
        for key in keys:
            if key not in state:
                state[key] = torch.zeros_like(owner, memory_format=torch.preserve_format)
        # torch's fused AdamW wants a float32 tensor beside the weights, DeepSpeed's CPU Adam a plain number.
        state["step"] = torch.tensor(float(step), device=owner.device) if torch_optimizer else step


def allocate_optimizer_state(engine: Engine) -> None:
    """Allocate the optimizer's state before the first step, which would allocate it in its update, and see that there
    is room for what an update holds besides: the gradients, and their float32 copies. Then memory that is too small for
    the model ends the start with what to do, and not the first update."""
    if engine.wrapper is Wrapper.ZERO_3 and engine.wrapped.swap_optimizer:  # on NVMe
        return
    owners = _owners(engine)
    sizes = [owner.numel() for owner in owners if owner.device == engine.device]
    try:
        init_optimizer_state(engine, ["exp_avg", "exp_avg_sq"], 0)
        # Stage 0 needs no copies that count: none in float32, a bucket's at a time else. Others copy group by group.
        copies = 4 * max(sizes, default=0) if engine.stage else 0
        torch.empty(_gradient_bytes(engine) + copies, dtype=torch.uint8, device=engine.device)
    except torch.OutOfMemoryError as error:
        masters = sum(owner.numel() for owner in owners)
        raise UserError(
            f"rank {torch.distributed.get_rank()} has no memory for an update of its {masters:,} parameters "
            f"({8 * masters / 1e9:.1f} GB of optimizer state, and gradients): {str(error).splitlines()[0]}",
            "Use a higher ZeRO stage, more GPUs, or offloading (ds_configs/zero3_offload.json); `lumina estimate-time` "
            "says what fits.",
        ) from None


def _gradient_bytes(engine: Engine) -> int:
    """What this rank's gradients take before an update."""
    trained = [p for p in engine.model.parameters() if p.requires_grad]
    whole = sum(whole_numel(p) * p.element_size() for p in trained)
    return whole if engine.stage < 2 else whole // torch.distributed.get_world_size()


def _owners(engine: Engine) -> list[Tensor]:
    match engine.wrapper:
        case Wrapper.ZERO_3:
            return list(engine.wrapped.fp32_partitioned_groups_flat)
        case Wrapper.ZERO_1_2:
            return list(engine.wrapped.single_partition_of_fp32_groups)
        case Wrapper.BF16:
            return list(engine.wrapped.fp32_groups_flat_partition)
        case Wrapper.HALF | Wrapper.NONE:
            return [p for group in engine.optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def sync_weights(engine: Engine) -> None:
    """Make the model's weights follow the float32 ones after these were loaded, on every rank."""
    wrapped = engine.wrapped
    if engine.wrapper is Wrapper.ZERO_3:
        for parameter in engine.model.parameters():
            drop_secondary_copy(parameter)
        for index, flat in enumerate(wrapped.fp32_partitioned_groups_flat):
            wrapped.fp16_partitioned_groups_flat[index].copy_(flat)
            wrapped._unflatten_partitioned_parameters(index)
        if wrapped.persistent_parameters:  # small parameters are kept whole on every rank: gather them anew
            wrapped.persistent_parameters[0].partition(wrapped.persistent_parameters)
            wrapped.persistent_parameters[0].all_gather(wrapped.persistent_parameters)
    elif engine.wrapper is not Wrapper.NONE:  # there the optimizer updates the model's weights themselves
        wrapped.update_lp_params()


@dataclass
class EngineSnapshot:
    """A copy in host memory of an engine's weights and optimizer state, for another one of the same world and stage."""

    values: dict[tuple[str, str], Tensor]  # by kind and parameter
    kinds: list[str]
    step: int
    loss_scale: dict[str, float]


@torch.no_grad()
def snapshot_engine(engine: Engine) -> EngineSnapshot:
    """Copy what `fragments_to_load` covers to the host; not collective. What a failed step left half done elsewhere is
    not looked at."""
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    values, kinds = {}, set()
    for piece in fragments_to_load(engine):
        found = {MASTER: piece.view(piece.owner), **moments(engine, piece)}
        kinds |= found.keys() - {MASTER}
        for kind, value in found.items():
            values[kind, piece.name] = value.detach().to("cpu", copy=True)
    return EngineSnapshot(values, sorted(kinds), step_count(engine), engine.loss_scale())


@torch.no_grad()
def restore_engine(engine: Engine, snapshot: EngineSnapshot) -> None:
    """Load a snapshot into a fresh engine; collective."""
    init_optimizer_state(engine, snapshot.kinds, snapshot.step)
    for piece in fragments_to_load(engine):
        piece.view(piece.owner).copy_(snapshot.values[MASTER, piece.name])
        for kind in snapshot.kinds:
            piece.view(engine.optimizer.state[piece.owner][kind]).copy_(snapshot.values[kind, piece.name])
    engine.set_loss_scale(snapshot.loss_scale)
    sync_weights(engine)
