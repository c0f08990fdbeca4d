"""Benchmark cases: every operator and direction at every preset's shape."""

from __future__ import annotations

import torch

from .benchmark import BENCHMARKS, Case, Shape

#: (operator, direction) -> the fewest elements that can be moved per element of the result (times 2 bytes in bf16).
LIMITS: dict[tuple[str, str], int] = {
    (name, direction): limit for name, each in BENCHMARKS.items() for direction, limit in each.limits.items()
}
OPERATORS = tuple(BENCHMARKS)


#: The presets of lumina/config/presets (a test holds the two together), 8,192 tokens a micro-batch.
PRESETS = (
    Shape("nano", 256, 704, 4, 2, sequence=512),
    Shape("debug", 512, 1408, 8, 2, sequence=1024),
    Shape("small", 768, 2048, 12, 4, sequence=2048),
    Shape("medium", 1024, 2752, 16, 4, sequence=4096),
    Shape("large", 2048, 5504, 32, 8, sequence=8192),
)


def sweep() -> tuple[Shape, ...]:
    """Widths from 256 to 65,536 at 2^25 elements, for one curve per operator."""
    widths = (256, 512, 768, 1024, 2048, 4096, 5504, 8192, 16384, 32768, 65536)
    return tuple(
        Shape(f"width {w}", w, w, max(1, w // 80), max(1, w // 320), 64, w, max(512, 2**25 // w)) for w in widths
    )


def cases(shapes: tuple[Shape, ...], ops: tuple[str, ...], dtype: torch.dtype) -> list[Case]:
    """Every case of these shapes and operators."""
    return [Case(op, direction, shape, dtype) for shape in shapes for op, direction in LIMITS if op in ops]
