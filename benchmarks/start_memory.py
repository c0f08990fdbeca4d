"""Host memory of every rank while a ZeRO-3 run starts, with weights divided as they are drawn and with a whole model.

    python benchmarks/start_memory.py [--ranks 1 2 4] [--hidden 1024] [--layers 16] [--precision fp32]

Three starts: `draws` begins with drawn weights, `loads` with another run's (--init-from), `adapts` puts adapters over
another run's (--init-from with lora_rank). Each rank reports the highest resident memory above what its imports took,
in MB of 10^6 bytes: for the model alone, before the engine is made; anonymous memory (sampled every 2 ms) of the whole
start; and all of it (VmHWM), which counts the pages of the
checkpoint's file that were read too (the kernel's cache, given back on demand). `model` is the whole model in float32,
`largest` its largest matrix, `share` 1/ranks of the model. The hash is over every parameter's float32 values, whole:
equal hashes are equal weights. Exits with 1 when two hashes of one start differ. CPU, gloo, one thread a rank.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SHAPE = {"num_heads": 16, "num_kv_heads": 4, "seq_length": 64, "vocab_size": 32_000, "batch_size": 1}


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


class Peak:
    """The highest memory of this process while it is open, above what there was before."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
        self._before = status("RssAnon"), status("VmRSS")
        self.anonymous, self.built, self._ended = 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._ended.wait(0.002):
            self.anonymous = max(self.anonymous, status("RssAnon") - self._before[0])

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        self.all = status("VmHWM") - self._before[1]


def make(options: argparse.Namespace, stage: int, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """The configuration and DeepSpeed's."""
    from lumina.config import Config
    from lumina.config import deepspeed as ds_json

    values = SHAPE | {"hidden_size": options.hidden, "num_layers": options.layers, "precision": options.precision}
    document = ds_json.default_json(2)
    document["zero_optimization"]["stage"] = stage
    world = int(os.environ["WORLD_SIZE"])
    config = Config.create(values | changes, frozenset())
    resolved = ds_json.resolve(config, world, "cpu", bf16_supported=True, document=document)
    return resolved.config, resolved.json


def begin(rank: int, world: int, port: int) -> None:
    """Everything that a rank imports, and the process group."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    from lumina.model import keep_heap
    from lumina.train import run
    from lumina.train.deepspeed import init_process_group

    assert run  # its imports are what is left out of the account
    keep_heap()
    init_process_group()


def build(options: argparse.Namespace, start: str, base: Path, peak: Peak) -> Any:
    """A started engine, as lumina.train.make_engine makes one. Notes in `peak` how much the model alone took."""
    import torch

    from lumina.model import Transformer, lora
    from lumina.train.deepspeed import engine, partitioned_init
    from lumina.train.saving import snapshot

    config, document = make(options, 3, **({"lora_rank": 8} if start == "adapts" else {}))
    torch.manual_seed(config.seed)
    with partitioned_init.partition_on_init(document, drawn=start != "loads"):
        model = Transformer(config)
        if start == "adapts":
            lora.attach(model, config)
    if start == "adapts":
        snapshot.load_frozen_weights(model, base)
    peak.built = peak.anonymous
    made = engine.Engine(model, config, document)
    if start == "loads":
        snapshot.load_weights(base, made)
    return made


def digest(made: Any) -> str:
    """Over all parameters, each gathered by itself."""
    import torch
    import torch.distributed as dist

    hashed = hashlib.sha256()
    masters: dict[str, Any] = {}
    from lumina.train.deepspeed import owned_fragments

    for fragment in owned_fragments(made):
        masters[fragment.name] = fragment.view(fragment.owner)
    for name, parameter in made.model.named_parameters():
        shard = torch.zeros(parameter.ds_tensor.ds_numel)
        own = masters.get(name, parameter.ds_tensor)[: len(shard)]
        shard[: len(own)] = own
        shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, shard)
        hashed.update(torch.cat(shards)[: parameter.ds_numel].numpy().tobytes())
    return hashed.hexdigest()[:16]


def one_rank(rank: int, world: int, port: int, options: Any, start: str, base: Path, whole: bool, out: Any) -> None:
    begin(rank, world, port)
    from lumina.train.deepspeed import partitioned_init

    if whole:
        partitioned_init.partitions_on_init = lambda _: False
    began = time.perf_counter()
    with Peak() as peak:
        made = build(options, start, base, peak)
    seconds = time.perf_counter() - began
    out.put((rank, peak.built, peak.anonymous, peak.all, seconds, digest(made)))
    out.close()
    out.join_thread()
    os._exit(0)


def write_base(port: int, options: argparse.Namespace, folder: Path) -> None:
    """A checkpoint to start from, written by one rank."""
    begin(0, 1, port)
    import torch

    from lumina.checkpoint import Retention, SaveJob, Saver, SaveTarget, TrainerState, model_shape
    from lumina.model import Transformer
    from lumina.train.deepspeed import engine
    from lumina.train.saving.snapshot import take_snapshot

    config, document = make(options, 0, precision="fp32")
    torch.manual_seed(7)
    made = engine.Engine(Transformer(config), config, document)
    saver = Saver(0, 1, "base", 600)
    saver.begin(
        SaveJob(
            take_snapshot(made, TrainerState(step=1, model=model_shape(config))),
            [SaveTarget("checkpoint", folder, Retention(1))],
        )
    )
    saver.wait()
    os._exit(0)


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_all(target: Any, arguments: list[tuple[Any, ...]], results: Any = None) -> list[Any]:
    """Run a function in processes of their own, and take one result of each."""
    processes = [multiprocessing.get_context("spawn").Process(target=target, args=each) for each in arguments]
    for process in processes:
        process.start()
    found = [results.get(timeout=900) for _ in processes] if results is not None else []
    for process in processes:
        process.join()
    return sorted(found)


def measure(options: argparse.Namespace, start: str, base: Path, world: int, whole: bool) -> list[Any]:
    """(rank, model, anonymous, all, seconds, hash) of each rank."""
    out = multiprocessing.get_context("spawn").Queue()
    common = (world, port(), options, start, base, whole, out)
    return run_all(one_rank, [(rank, *common) for rank in range(world)], out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--starts", nargs="+", default=["draws", "loads", "adapts"])
    parser.add_argument("--divided-only", action="store_true", help="leave the whole model out: it needs more memory")
    options = parser.parse_args()
    os.environ["WORLD_SIZE"] = "1"
    config, _ = make(options, 3)
    count, matrix = config.num_parameters(), config.hidden_size * max(config.vocab_size, 2 * config.ffn_size)
    print(
        f"{count / 1e6:.1f} M parameters, {options.precision}: model {4e-6 * count:.0f} MB, largest {4e-6 * matrix:.0f}"
    )
    columns = f"{'model, by rank':<24}  {'anonymous by rank':<24}  {'all by rank':<24}"
    print(f"{'start':<7} ranks  way       share  {columns}  seconds  hash")
    hashes: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "checkpoints" / "step-00000001"
        if {"loads", "adapts"} & set(options.starts):
            run_all(write_base, [(port(), options, base.parent)])
        for start in options.starts:
            for world in options.ranks:
                for whole in [True, False][int(options.divided_only) :]:
                    found = measure(options, start, base, world, whole)
                    hashes.setdefault(start, set()).update(one[5] for one in found)
                    columns = "  ".join(f"{' '.join(f'{r[i] / 1e6:5.0f}' for r in found):<24}" for i in (1, 2, 3))
                    way = "whole" if whole else "divided"
                    print(
                        f"{start:<7} {world:5}  {way:<8} {4e-6 * count / world:6.0f}  {columns}"
                        f"  {max(one[4] for one in found):7.1f}  {found[0][5]}",
                        flush=True,
                    )
    for start, different in hashes.items():
        print(f"{start}: {'equal weights' if len(different) == 1 else 'WEIGHTS DIFFER'}")
    return int(any(len(different) > 1 for different in hashes.values()))


if __name__ == "__main__":
    sys.exit(main())
