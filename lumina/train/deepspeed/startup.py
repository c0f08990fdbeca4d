"""The start of a rank: DeepSpeed imported and checked, the process group joined, and the end of both.

DeepSpeed is imported here first, without what it loads for nobody; see `import_deepspeed`.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import secrets
import socket
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch

from lumina.cluster import (
    Launched,
    await_key,
    await_ranks,
    bind,
    detect_launcher,
    end_with_parent,
    launched,
    parent_signal,
    refuse_taken_port,
)
from lumina.config import UserError, explain_duplicate, take_device, usable_cpus
from lumina.data import Part
from lumina.train.deepspeed import extensions, surface
from lumina.train.torch_private import default_store, set_group_timeouts

log = logging.getLogger("lumina")
_starts = itertools.count()  # of this process
_WATCHED = timedelta(days=7)
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. start: a token of this start of a run, the same on every rank: a process may train
    several runs one after another, and the process group's store keeps what the ranks of an earlier one said in it.
    refusal: what this rank cannot start with; it has joined the others to tell them (lumina.train.agreement). sequence:
    how many neighbouring ranks share each row's tokens."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    start: str = ""
    refusal: UserError | None = None
    sequence: int = 1

    @property
    def data_world(self) -> int:
        """How many readers of samples there are: groups of ranks that share rows."""
        return self.world // self.sequence

    @property
    def data_rank(self) -> int:
        """Which of them this rank belongs to."""
        return self.rank // self.sequence

    @property
    def part(self) -> Part:
        """What this rank has of its group's rows."""
        return Part(self.rank % self.sequence, self.sequence)

    @property
    def main(self) -> bool:
        return self.rank == 0


def init_process_group() -> Ranks:
    """Join the process group that the launcher described, or be a world of one. Sets the threads of this rank.

    Raises:
        UserError: this DeepSpeed is not one that Lumina knows (surface.py), two ranks were given one GPU, another
            process listens at rank 0's MASTER_PORT, or some ranks did not come.
    """
    place = launched()
    launcher = detect_launcher()
    rank, world, local, local_world = (int(os.environ[name]) for name in _NAMES)
    refusal = None
    try:
        _prepare_process(launcher, world, local, local_world)
    except UserError as error:
        if world == 1:
            raise
        refusal = error
    if not torch.distributed.is_initialized():
        _join(place)
    return Ranks(rank, world, local, local_world, _token_of_start(rank), refusal)


def _prepare_process(launcher: str | None, world: int, local: int, local_world: int) -> None:
    """This rank's parent, CPUs, GPU and DeepSpeed. Raises UserError."""
    if launcher is not None and world > 1:
        end_with_parent(parent_signal())
    if os.environ.get("LUMINA_BIND") == "1":
        cpus, threads = bind(local, local_world)
    else:
        cpus, threads = [], max(1, len(usable_cpus()) // local_world)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    if cpus:
        place = os.environ["RANK"], socket.gethostname()
        log.info("rank %s on %s: CPUs %s, %d thread(s)", *place, cpus, torch.get_num_threads())
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices:
        torch.cuda.set_device(take_device(local, local_world, devices))
        if local == 0 and devices > local_world:
            log.warning(
                "%d of %d GPUs on %s are idle: a launcher starts a rank on each (docs/cluster.md)",
                devices - local_world, devices, socket.gethostname(),
            )  # fmt: skip
    _quiet_deepspeed()
    import_deepspeed()
    surface.check()
    extensions.guard(importlib.import_module("deepspeed.ops.op_builder.builder").OpBuilder)


def _join(place: Launched) -> None:
    """Join the process group that the launcher described, once all of its ranks are there."""
    deepspeed = import_deepspeed()
    backend = importlib.import_module("deepspeed.comm.torch")  # `deepspeed.comm.torch` is torch itself
    # Its all-reduce through shared memory is for tensor-parallel inference alone. Made at every start, it would cost a
    # compilation on a new machine and 66 MB a rank, in a segment that a killed rank leaves to the next run on the same
    # port.
    vars(backend)["build_shm_op"] = lambda: None
    try:
        store = await_ranks(place, _patience()) if place.world > 1 else None
        deepspeed.init_distributed(verbose=False)
        del store  # the process group has its own connection to it
    except RuntimeError as error:
        if place.rank == 0 and isinstance(error, torch.distributed.DistError) and "MASTER_PORT" in os.environ:
            refuse_taken_port(int(os.environ["MASTER_PORT"]), "MASTER_PORT")
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise explain_duplicate(error, devices, place.local_world) or error from None


def _token_of_start(rank: int) -> str:
    """A token of this start, which rank 0 chooses. Without a collective: a rank that is about to refuse may have no
    device for one."""
    store, key = default_store(), f"lumina/start/{next(_starts)}"
    if rank == 0:
        store.set(key, secrets.token_hex(4))
    return await_key(store, key, _patience()).decode()


def set_collective_timeout(watched: bool = False) -> None:
    """One timeout for the collectives of all process groups, DeepSpeed's and the model's too: torch gives each group
    that is made without one its backend's (NCCL 10 minutes, gloo 30). It is DeepSpeed's (10 minutes, or
    DEEPSPEED_TIMEOUT); where a watchdog watches, none to speak of: NCCL counts from when a collective is queued, which
    may be hours before its turn, and only the watchdog knows a long step from a hang, and says where it is."""
    if torch.distributed.is_initialized():
        set_group_timeouts(_WATCHED if watched else import_deepspeed().constants.default_pg_timeout)


def _patience() -> float:
    """Seconds in which the other ranks come."""
    return float(import_deepspeed().constants.default_pg_timeout.total_seconds())


def import_deepspeed() -> Any:
    """DeepSpeed, without two things that it loads at every start for nobody: mlflow, which its autotuner imports
    wherever there is one (three seconds), and torch's compiler, for functions of the Muon optimizer (four a rank)."""
    if not torch.cuda.is_available():
        # A CUDA build without a driver, too: unset, DeepSpeed looks for every kind of accelerator and warns.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    hide, compile_ = "mlflow" not in sys.modules, torch.compile
    if hide:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # so Python marks what cannot be imported
    torch.compile = lambda model=None, **_: model
    try:
        import deepspeed
        import deepspeed.runtime.zero.muon.muon_optimizer
    finally:
        torch.compile = compile_
        if hide:
            del sys.modules["mlflow"]
    return deepspeed


def _quiet_deepspeed() -> None:
    """DeepSpeed logs dozens of lines on start; Lumina says what matters itself. LUMINA_DEBUG=1 keeps them."""
    if os.environ.get("LUMINA_DEBUG") == "1":
        return
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import_deepspeed().utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\..*")
    warnings.filterwarnings("ignore", message=".*barrier.*device.*")


def destroy_process_group() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End the process here and now with `code`.

    gloo's threads outlive destroy_process_group while DeepSpeed holds its groups. One that drops its last tensor while
    the interpreter is being torn down is killed inside a destructor, and the process aborts: one in six of the shortest
    two-rank runs reported -6 after finishing well (torch 2.13, Python 3.11), a user's mistake was restarted as a crash,
    and one rank alone has ended so too.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
