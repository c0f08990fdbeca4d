"""Benchmark of an operator, declared in the operator's own file: `benchmark(name, ours, plain torch, ...)`.

Bytes are those that memory must see. A streamed tensor counts with every byte that the kernels ask for; a table (the
norm's weight, RoPE's angles), read by many programs out of L2, counts once; the partial sums of dweight count where
they are written and again where they are read. Only the second sweep over a row, of cross entropy and of the norms too
wide for one program, is taken to hit L2 and left out. `tests/kernels/test_bytes.py` counts the interpreter's loads and
stores and finds these very numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .launch import Launch

Function = Callable[..., Any]


@dataclass(frozen=True)
class Shape:
    """A model's widths, the tokens of one launch and of one sequence (rows of RoPE's tables)."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int = 64
    vocabulary: int = 100352
    tokens: int = 8192
    sequence: int = 2048


@dataclass(frozen=True)
class Benchmark:
    """One operator as the benchmark sees it.

    limits: by direction, the fewest elements that can be moved per element of the result. width: elements of one
    token's result. arguments: random ones, of which those to differentiate require gradients. launches: as the operator
    makes them, on empty tensors. other_bytes: what these move beside the limit. narrow: by kernel, the accesses below
    128 bits that it is allowed, each made once per program or once per row, beside the streamed tensors. most_rows: of
    one launch. liger: Liger's function with our arguments; raises ImportError where it is not installed.
    """

    ours: Function
    eager: Function
    limits: Mapping[str, int]
    width: Callable[[Shape], int]
    arguments: Callable[[Case, str], tuple[Any, ...]]
    launches: Callable[[Case, str], list[Launch]]
    other_bytes: Callable[[Case, list[Launch]], int] = lambda case, launches: 0
    narrow: Mapping[str, int] = field(default_factory=dict)
    most_rows: int | None = None
    liger: Callable[[], Function] | None = None


#: By the operator's name; filled by the operators' files, which `lumina.kernels` imports.
BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(name: str, ours: Function, eager: Function, **others: Any) -> None:
    """Enter an operator (arguments: Benchmark's)."""
    BENCHMARKS[name] = Benchmark(ours, eager, **others)


@dataclass(frozen=True)
class Case:
    """One operator in one direction at one shape and type."""

    op: str
    direction: str
    shape: Shape
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Elements of one token's result."""
        return BENCHMARKS[self.op].width(self.shape)

    @property
    def rows(self) -> int:
        """Rows of one launch."""
        return min(self.shape.tokens, BENCHMARKS[self.op].most_rows or self.shape.tokens)

    @property
    def elements(self) -> int:
        """Elements of the result: what bytes are counted per."""
        return self.rows * self.width

    @property
    def limit(self) -> int:
        """The fewest bytes that the operation can move."""
        return BENCHMARKS[self.op].limits[self.direction] * self.elements * self.dtype.itemsize

    def launches(self, device: str = "meta") -> list[Launch]:
        """The launches as the operator makes them, on empty tensors."""
        return BENCHMARKS[self.op].launches(self, device)

    def bytes(self, launches: list[Launch]) -> int:
        """Bytes that these launches move (see the top of the file)."""
        return self.limit + BENCHMARKS[self.op].other_bytes(self, launches)

    def normal(self, *size: int, device: str, grad: bool = True) -> torch.Tensor:
        """A random tensor of the case's type."""
        return torch.randn(size, dtype=torch.float32, device=device).to(self.dtype).requires_grad_(grad)
