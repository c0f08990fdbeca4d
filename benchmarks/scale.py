"""What changes at 1,000 and 10,000 GPUs: the tables of docs/scale.md.

    python benchmarks/scale.py [--folder DIR] [--gpus 1000 10000] [--parameters 7e9 70e9] [--no-measure]

First the parts are measured here: writing a rank's checkpoint (hashed and flushed, by the code that training uses),
hashing it for verification, reading it into tensors, copying it aside, reading a rank's entry, opening a rank's file,
importing, and the ranks' meeting. Then failures, checkpoint intervals and lost time are computed from them; what could
not be measured here is an option, and is printed as an assumption.

Failures: 419 unexpected interruptions in 54 days on 16,384 GPUs (Llama 3, arXiv:2407.21783, section 3.3.4).
Interval: Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", 2006, whose first term
is Young's sqrt(2 * C * M) of 1974; C is how long the training waits for a save, M the mean time between failures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path

BYTES = 12  # per parameter: float32 weights and Adam's two moments
GPUS_PER_NODE = 8
FAILURES_PER_GPU_DAY = 419 / 54 / 16384
ENTRY = {"name": "rank-00000-of-10000.safetensors", "bytes": 123456789, "sha256": "0" * 64}


@dataclass
class Parts:
    """Rates in bytes/s for one rank, times in seconds. The defaults were measured on two busy cores (docs/scale.md)."""

    write: float = 2.86e8
    verify: float = 1.12e9
    read: float = 4.2e9
    copy: float = 3.38e9
    entry: float = 3.81e-5
    open: float = 1.93e-4
    imports: float = 7.23
    meeting: float = 0.966


# --- Measuring ------------------------------------------------------------------------------------

_MEET = """
import time
import deepspeed
from lumina.train.deepspeed import startup
began = time.perf_counter()
startup.init_process_group()
print(f"met {time.perf_counter() - began:.3f}", flush=True)
startup.destroy_process_group()
startup.end_process(0)
"""


def measure(folder: Path, megabytes: int) -> Parts:
    import torch

    from lumina.checkpoint import CheckpointReader, Snapshot, commit, write_rank_file
    from lumina.files import file_sha256

    count = megabytes * 2**20 // BYTES
    tensors = {f"{key}/w": [torch.randn(count)] for key in ("master", "exp_avg", "exp_avg_sq")}
    snapshot = Snapshot(1, tensors, {"w": [0, count]})
    part = folder / "part"

    def rate(work: object, repeats: int = 3) -> float:
        best = math.inf
        for _ in range(repeats):
            began = time.perf_counter()
            work()  # type: ignore[operator]
            best = min(best, time.perf_counter() - began)
        return snapshot.bytes / best

    def committed(written: Path, of: Snapshot, world: int) -> Path:
        return commit(written, of, world, time.monotonic() + 60, verify=False, may_commit=lambda: True)

    aside = {name: torch.empty_like(tensor) for name, (tensor,) in tensors.items()}
    write = rate(lambda: write_rank_file(part, snapshot, 0, 1))
    (file,) = part.glob("*.safetensors")
    verify = rate(lambda: file_sha256(file))
    reader, out = CheckpointReader(committed(part, snapshot, 1)), torch.empty(count)
    read = rate(lambda: [reader.read(key, "w", 0, out) for key in ("master", "exp_avg", "exp_avg_sq")])
    copy = rate(lambda: [aside[name].copy_(tensor) for name, (tensor,) in tensors.items()])
    entries = [folder / f"entry-{n:05d}.json" for n in range(500)]
    for path in entries:
        path.write_text(json.dumps(ENTRY))
    began = time.perf_counter()
    for path in entries:
        json.loads(path.read_text())
    entry = (time.perf_counter() - began) / len(entries)
    for rank in range(len(entries)):
        small = Snapshot(2, {"master/w": [torch.zeros(1)]}, {"w": [rank, 1]})
        write_rank_file(folder / "many", small, rank, len(entries))
    many = committed(folder / "many", small, len(entries))
    began = time.perf_counter()
    CheckpointReader(many)
    opened = (time.perf_counter() - began) / len(entries)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import lumina.train.run, deepspeed"], check=True, capture_output=True)
    return Parts(write, verify, read, copy, entry, opened, time.perf_counter() - began, _meeting())


def _meeting() -> float:
    """Seconds until two ranks have joined their process group, imports done."""
    from lumina.cluster import free_port

    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _MEET],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    return min(float(line.split()[1]) for text in said for line in text.splitlines() if line.startswith("met"))


# --- Computing ------------------------------------------------------------------------------------


def daly(cost: float, between: float) -> float:
    """Daly's interval between checkpoints that cost `cost` seconds, failures coming every `between` seconds."""
    if cost >= 2 * between:
        return between
    x = cost / (2 * between)
    return math.sqrt(2 * cost * between) * (1 + math.sqrt(x) / 3 + x / 9) - cost


def rows(gpus: int, parameters: float, parts: Parts, given: argparse.Namespace) -> list[str]:
    """One row for saves beside the training, one for saves that it waits for."""
    between = 86400 / (gpus * given.failures)
    whole, share = BYTES * parameters, BYTES * parameters / gpus
    node = GPUS_PER_NODE * share / given.node_storage
    write = max(share / parts.write, whole / given.storage, node) + gpus * parts.entry
    stall = share / parts.copy
    verify = max(whole / (parts.verify * given.hash_threads), whole / given.node_storage)
    read = max(share / parts.read, whole / given.storage, node) + gpus * parts.open
    restart = given.detect + parts.imports + parts.meeting + given.init + verify + read + given.warm_up
    found = []
    for way, cost in (("beside", stall), ("waits", write)):
        interval = max(daly(cost, between), write)
        lost = interval / 2 + restart + (write if way == "beside" else 0)
        idle = cost / interval + lost / between
        cells = [f"{gpus:,}", f"{parameters / 1e9:g}B", f"{86400 / between:.2f}", f"{whole / 1e9:,.0f} GB"]
        cells += [f"{share / 1e6:,.0f} MB", f"{write:.1f} s", f"{verify:.0f} s", f"{restart:.0f} s", way]
        cells += [f"{cost:.2f} s", f"{interval:.0f} s", f"{lost:.0f} s", f"{idle:.2%}"]
        found.append("| " + " | ".join(cells) + " |")
    return found


HEAD = (
    "GPUs", "model", "failures a day", "checkpoint", "a rank's part", "written in", "verified in", "restart",
    "saving", "training waits", "interval", "lost by a failure", "of all time",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the measured checkpoint goes: the disk that is measured")
    parser.add_argument("--megabytes", type=int, default=192, help="of the measured checkpoint (192)")
    parser.add_argument("--no-measure", action="store_true", help="compute from the figures kept in this file")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--parameters", type=float, nargs="+", default=[7e9, 70e9])
    assumed = parser.add_argument_group("assumed (bytes/s and seconds)")
    assumed.add_argument("--storage", type=float, default=100e9, help="shared storage, all nodes together (1e11)")
    assumed.add_argument("--node-storage", type=float, default=10e9, help="shared storage to one node (1e10)")
    assumed.add_argument("--hash-threads", type=int, default=16, help="threads that verify, on rank 0's node (16)")
    assumed.add_argument("--detect", type=float, default=15.0, help="node_timeout and the last call (15)")
    assumed.add_argument("--init", type=float, default=30.0, help="NCCL and DeepSpeed building their groups (30)")
    assumed.add_argument("--warm-up", type=float, default=10.0, help="the first step's compiling and allocating (10)")
    assumed.add_argument(
        "--failures", type=float, default=FAILURES_PER_GPU_DAY, metavar="N", help="a day and GPU (Llama 3: 4.74e-4)"
    )
    given = parser.parse_args()
    parts = Parts()
    if not given.no_measure:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            parts = measure(Path(folder), given.megabytes)
    print("kept: " if given.no_measure else "measured: ", end="")
    print(", ".join(f"{f.name} {getattr(parts, f.name):.3g}" for f in fields(parts)))
    names = ("storage", "node_storage", "hash_threads", "detect", "init", "warm_up")
    print("assumed: " + ", ".join(f"{name} {getattr(given, name):.3g}" for name in names))
    print(f"failures: {given.failures:.3g} a day and GPU, one in {24 / given.failures:,.0f} GPU-hours\n")
    print("| " + " | ".join(HEAD) + " |")
    print("|" + "---|" * len(HEAD))
    for gpus in given.gpus:
        for parameters in given.parameters:
            print("\n".join(rows(gpus, parameters, parts, given)))


if __name__ == "__main__":
    main()
