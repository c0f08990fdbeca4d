"""What finding stragglers, hangs and wrong samples costs a training step, at the nano preset on two ranks.

    python benchmarks/stragglers.py [--steps 12] [--tokens 512]

What a step does for it is timed by itself: the watchdog's heartbeats and the two ticks a second of its thread, this
step's times kept, the three sums over its samples, and a fiftieth of the comparison of the ranks (straggler_interval
50; a barrier before it, so that it is not charged with waiting for the other rank). That is put over the time of a
real training step of one micro-batch, the shortest there is, in the same processes and in turn with it: a difference
of two step times would drown in their noise. The last line is the overhead; the bar is 1%."""

from __future__ import annotations

import argparse
import faulthandler
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

TICK = 0.5  # seconds, of the watchdog's thread
REPEATS = 200


def per_call(work: Callable[[], object], repeats: int = REPEATS) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - began) / repeats


def worker(arguments: argparse.Namespace) -> None:
    from shapes import debug_trainer

    trainer, batch = debug_trainer(arguments.tokens, "nano")

    import numpy as np
    import torch.distributed as dist

    from lumina.cluster import StopRequest
    from lumina.config import load
    from lumina.data import sample_sums, samples_id
    from lumina.train.deepspeed import Ranks, end_process
    from lumina.train.liveness.stragglers import Stragglers
    from lumina.train.liveness.watchdog import Watchdog

    config, world, rank = load("nano"), dist.get_world_size(), dist.get_rank()
    interval = config.straggler_interval
    stragglers = Stragglers(Ranks(rank, world, rank, world), interval, config.straggler_factor)
    samples = np.arange(arguments.samples)
    seconds: dict[str, list[float]] = {name: [] for name in ("step", "heartbeats", "tick", "sums", "comparison")}
    with Watchdog(config.hang_timeout, config.stop_timeout, StopRequest(), rank) as dog:

        def heartbeats() -> None:  # of one step: its micro-batch, its update, and the times that it took
            dog.heartbeat("step 1, micro-batch 1")
            dog.heartbeat("step 1, update")
            stragglers.add(0.1, 0.1, 1e12)

        def compare() -> None:
            stragglers.add(0.1, 0.1, 1e12)
            assert stragglers.compare(interval) is not None

        for number in range(arguments.steps + 3):
            dist.barrier()
            began = time.perf_counter()
            trainer.set_lr(1e-5)
            trainer.accumulate(batch, 1 / arguments.tokens, last=True)
            trainer.step()
            step = time.perf_counter() - began
            dist.barrier()
            found = {
                "step": step,
                "heartbeats": per_call(heartbeats),
                "tick": per_call(lambda: faulthandler.dump_traceback_later(600, exit=True), 20),
                "sums": per_call(lambda: samples_id(*sample_sums(samples))),
            }
            dist.barrier()
            found["comparison"] = per_call(compare, 5)
            for name, value in found.items():
                if number >= 3:  # the first steps allocate
                    seconds[name].append(value)
    if rank == 0:
        step, heartbeat, tick, sums, comparison = (statistics.median(values) for values in seconds.values())
        print(
            f"training step {1e3 * step:.1f} ms; heartbeats {1e6 * heartbeat:.1f} us, sample sums {1e6 * sums:.1f} us, "
            f"a tick {1e6 * tick:.0f} us every {TICK} s, a comparison {1e3 * comparison:.2f} ms every {interval} steps"
        )
        print(f"overhead {(heartbeat + sums + comparison / interval) / step + tick / TICK:.3%} of a step")
    dist.barrier()
    end_process(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a training step and rank")
    parser.add_argument("--samples", type=int, default=4, help="samples of a training step and rank")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        worker(arguments)
        return
    from lumina.cluster import free_port

    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    place = {**os.environ, **place, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    sys.exit(max(rank.wait() for rank in ranks))


if __name__ == "__main__":
    main()
