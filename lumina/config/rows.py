"""Row counts of matrices: whole tiles, where batches are made, and how many rows of logits are alive at once."""

from __future__ import annotations

import math

# Matrix libraries prepare code for every shape they meet: oneDNN keeps about 1 MB for each, and a run with new row
# counts at every step grew by 20 MB a step.
ROW_TILE = 64


def round_up(rows: int) -> int:
    """The smallest multiple of ROW_TILE that is not less than `rows`."""
    return -(-rows // ROW_TILE) * ROW_TILE


# Bytes of logits alive at once on a CPU: 1,337 rows of a 100,352-word vocabulary in bfloat16, enough for its matrix
# products to run at full speed, small beside the optimizer state.
CHUNK_BYTES = 256 * 2**20

# FLOPs of half-precision products in the time of one byte through a GPU's memory, both as reached, not as published:
# A100 131 to 172, H200 138, H100 198, B200 205, H100-PCIe 253, L40S 281 by the shares in
# lumina/plan/costs/devices.yaml.
_FLOPS_PER_BYTE = 300
_TRAFFIC = 0.05  # of the products' time, at most, for the float32 weight gradient's way through memory
_SHARE = 1 / 32  # of the device's memory, at most


def output_chunk_bytes(vocabulary: int, element_size: int, memory: float | None) -> int:
    """Bytes of logits alive at once on a GPU of `memory` bytes (None: unknown, no bound), whole tiles of rows.

    A chunk of r rows costs three products of r x V x D, 6 r V D FLOPs. Where there are several, each also reads and
    writes the weight gradient that it adds to, in float32: 8 V D bytes. The two times are in the ratio

        8 V D * _FLOPS_PER_BYTE / (6 r V D) = 4 * _FLOPS_PER_BYTE / (3 r)

    in which the vocabulary V and the hidden width D cancel: r >= 4 * 300 / (3 * 0.05) = 8,000 rows make it 5% or less,
    1.6 GB of logits at 100,352 words in bfloat16. (The 256 MiB of a CPU are 1,337 rows: 20% on an H100.) The bound is a
    share of all the device's memory, not of what is free now: that would change the chunks, and with them the order of
    the sums, from one run to its repetition (law 6), and the host would have to ask for it.
    """
    row = vocabulary * element_size
    rows = round_up(math.ceil(4 * _FLOPS_PER_BYTE / (3 * _TRAFFIC)))
    if memory is not None:
        most = int(memory * _SHARE) // row
        rows = max(1, min(rows, most // ROW_TILE * ROW_TILE or most))
    return rows * row
