"""The order of samples at 10 thousand, 10 million and 10 billion samples: the same start and resume time.

    python benchmarks/sampler.py

`start` makes the order and the first step's samples; `resume` makes it anew and takes a step in a far epoch. The last
line is the slowest size's time over the fastest's.
"""

from __future__ import annotations

import statistics
import time

from lumina.data import GlobalOrder

SIZES = (10_000, 10_000_000, 10_000_000_000)
GLOBAL_BATCH = 256
REPEATS = 200


def measure(size: int, step: int) -> float:
    """The median seconds to make the order and one step's samples."""
    times = []
    for repeat in range(REPEATS):
        start = time.perf_counter()
        order = GlobalOrder(size, GLOBAL_BATCH, seed=repeat, fingerprint="benchmark")
        order.indices(step)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Prints a line for each size and the ratio."""
    measure(SIZES[0], 0)  # warm up
    medians = []
    for size in SIZES:
        steps = -(-size // GLOBAL_BATCH)
        start, resume = measure(size, 0), measure(size, 3 * steps + steps // 2)
        medians.append(max(start, resume))
        print(f"samples={size:>14,} start_us={start * 1e6:7.1f} resume_us={resume * 1e6:7.1f}")
    print(f"slowest_over_fastest={max(medians) / min(medians):.2f}")


if __name__ == "__main__":
    main()
