"""What is measured: every operator and direction at every preset's shape, its launches, and the bytes it must move.

Bytes are those that memory must see. A streamed tensor counts with every byte that the kernels ask for; a table (the
norm's weight, RoPE's angles), read by many programs out of L2, counts once; the shares of dweight count where they are
written and again where they are read. Only the second sweep over a row, of cross entropy and of the norms too wide for
one program, is taken to hit L2 and left out. `tests/kernels/test_bytes.py` counts the interpreter's loads and stores
and finds these very numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cross_entropy import cross_entropy_launch
from .launch import Launch
from .rms_norm import backward_launches as norm_backward_launches
from .rms_norm import forward_launch as norm_forward_launch
from .rope import rope_launch
from .swiglu import backward_launch as swiglu_backward_launch
from .swiglu import forward_launch as swiglu_forward_launch

#: (operator, direction) -> the fewest elements that can be moved per element of the result (times 2 bytes in bf16).
LIMITS: dict[tuple[str, str], int] = {
    ("rms_norm", "forward"): 2,
    ("rms_norm", "backward"): 3,
    ("add_rms_norm", "forward"): 4,
    ("add_rms_norm", "backward"): 4,
    ("rope", "forward"): 2,
    ("rope", "backward"): 2,
    ("swiglu", "forward"): 3,
    ("swiglu", "backward"): 5,
    ("cross_entropy", "both"): 2,
}
OPERATORS = tuple(dict.fromkeys(name for name, _ in LIMITS))


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
        shape = self.shape
        return {
            "rope": (shape.heads + shape.kv_heads) * shape.head_dim,
            "swiglu": shape.ffn,
            "cross_entropy": shape.vocabulary,
        }.get(self.op, shape.hidden)

    @property
    def rows(self) -> int:
        """Rows of one launch; the output loss works on chunks of 1,024."""
        return min(self.shape.tokens, 1024) if self.op == "cross_entropy" else self.shape.tokens

    @property
    def elements(self) -> int:
        """Elements of the result: what bytes are counted per."""
        return self.rows * self.width

    @property
    def limit(self) -> int:
        """The fewest bytes that the operation can move."""
        return LIMITS[self.op, self.direction] * self.elements * self.dtype.itemsize

    def launches(self, device: str = "meta") -> list[Launch]:
        """The launches as the operator makes them, on empty tensors."""
        return _BUILDERS[self.op](self, device)

    def bytes(self, launches: list[Launch]) -> int:
        """Bytes that these launches move (see the top of the file)."""
        size, rows, shape = self.dtype.itemsize, self.rows, self.shape
        streamed = self.limit
        if self.op == "rope":
            return streamed + launches[0].grid[1] * rows * 8 + 2 * shape.sequence * (shape.head_dim // 2) * 4
        if self.op == "cross_entropy":
            return streamed + rows * (8 + 4 + 4)
        if self.op == "swiglu":
            return streamed
        if self.direction == "forward":
            return streamed + self.width * size
        shares = 2 * int(launches[-1].args[0].numel()) * 4
        if (
            len(launches) == 3
        ):  # the wide backward: x and dy once more for dweight; rstd, written once and read by block
            rstd = (1 + launches[1].grid[0]) * rows * 4
            return streamed + 2 * self.elements * size + rstd + shares + 2 * self.width * size
        return streamed + shares + 2 * self.width * size


def cases(shapes: tuple[Shape, ...], ops: tuple[str, ...], dtype: torch.dtype) -> list[Case]:
    """Every case of these shapes and operators."""
    return [Case(op, direction, shape, dtype) for shape in shapes for op, direction in LIMITS if op in ops]


def _norm(case: Case, device: str) -> list[Launch]:
    x, y, residual, total = (torch.empty(case.rows, case.width, dtype=case.dtype, device=device) for _ in range(4))
    weight, dweight = (torch.empty(case.width, dtype=case.dtype, device=device) for _ in range(2))
    add = case.op == "add_rms_norm"
    if case.direction == "forward":
        return [norm_forward_launch(x, residual if add else None, weight, y, total if add else None, 1e-5)]
    return norm_backward_launches(y, x, weight, residual if add else None, total, dweight, 1e-5)


def _rope(case: Case, device: str) -> list[Launch]:
    s = case.shape
    # As the model does it: q and k straight out of a fused projection, whose heads for v follow.
    qkv = torch.empty(1, case.rows, s.heads + 2 * s.kv_heads, s.head_dim, dtype=case.dtype, device=device)
    q, k = qkv.narrow(2, 0, s.heads), qkv.narrow(2, s.heads, s.kv_heads)
    q_out, k_out = (torch.empty(x.shape, dtype=case.dtype, device=device) for x in (q, k))
    cos, sin = (torch.empty(s.sequence, s.head_dim // 2, device=device) for _ in range(2))
    positions = torch.arange(case.rows, device=device).remainder(s.sequence).view(1, -1)
    return [rope_launch(q, k, q_out, k_out, cos, sin, positions, case.direction == "backward")]


def _swiglu(case: Case, device: str) -> list[Launch]:
    x, dx = (torch.empty(case.rows, 2 * case.width, dtype=case.dtype, device=device) for _ in range(2))
    h = torch.empty(case.rows, case.width, dtype=case.dtype, device=device)
    return [swiglu_forward_launch(x, h) if case.direction == "forward" else swiglu_backward_launch(h, x, dx)]


def _cross_entropy(case: Case, device: str) -> list[Launch]:
    logits = torch.empty(case.rows, case.width, dtype=case.dtype, device=device)
    targets = torch.empty(case.rows, dtype=torch.int64, device=device)
    weights, losses = (torch.empty(case.rows, device=device) for _ in range(2))
    return [cross_entropy_launch(logits, targets, weights, losses)]


_BUILDERS = {
    "rms_norm": _norm,
    "add_rms_norm": _norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "cross_entropy": _cross_entropy,
}
