"""The benchmark on a GPU: our kernels beside torch eager, torch.compile and Liger (where installed).

Each side gets the same inputs and is timed by CUDA events. Inputs rotate through copies that together pass the L2 twice
over, so that no side is served from cache, and the bandwidth is told as a fraction of a plain copy measured the same
way.
"""

from __future__ import annotations

import functools
import importlib
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from . import reference
from .cases import Case
from .cross_entropy import cross_entropy_
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope
from .swiglu import swiglu

Function = Callable[..., Any]
#: What one side does on one set of inputs: the thing that is timed.
Step = Callable[[], Any]

OURS: dict[str, Function] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rope": rope,
    "swiglu": swiglu,
    "cross_entropy": cross_entropy_,
}
EAGER: dict[str, Function] = {
    "rms_norm": reference.rms_norm,
    "add_rms_norm": reference.add_rms_norm,
    "rope": reference.rope,
    "swiglu": reference.swiglu,
    "cross_entropy": reference.cross_entropy_,
}


@dataclass(frozen=True)
class Measured:
    """One side of one case: median microseconds, GB/s of the bytes our kernels move, and the fraction of a copy's."""

    case: Case
    side: str
    microseconds: float
    gigabytes: float
    fraction: float

    def fields(self) -> dict[str, str | int | float]:
        """Flat, for CSV and the printed table."""
        return {
            "shape": self.case.shape.name,
            "op": self.case.op,
            "direction": self.case.direction,
            "dtype": str(self.case.dtype).removeprefix("torch."),
            "rows": self.case.rows,
            "width": self.case.width,
            "side": self.side,
            "us": round(self.microseconds, 2),
            "GB/s": round(self.gigabytes, 1),
            "of_copy": round(self.fraction, 3),
        }


def liger() -> dict[str, Function]:
    """Liger's functions with our arguments; {} where it is not installed. Its RMSNorm casts as Llama's does."""
    try:
        norms = importlib.import_module("liger_kernel.ops.rms_norm")
        ropes = importlib.import_module("liger_kernel.ops.rope")
        gates = importlib.import_module("liger_kernel.ops.swiglu")
    except ImportError:
        return {}

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> Any:
        # It wants [B, H, S, D] and angles [B, S, D] of both halves; preparing them is part of what using it costs.
        both = [torch.cat((t[positions], t[positions]), -1).to(q.dtype) for t in (cos, sin)]
        return ropes.LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *both)

    def gate(gate_up: torch.Tensor) -> Any:
        return gates.LigerSiLUMulFunction.apply(*gate_up.chunk(2, -1))

    return {
        "rms_norm": lambda x, w, eps: norms.LigerRMSNormFunction.apply(x, w, eps, 0.0, "llama", False),
        "rope": rotate,
        "swiglu": gate,
    }


def inputs(case: Case, device: str) -> tuple[Any, ...]:
    """Random arguments of a case's operator; tensors to differentiate require gradients."""

    def normal(*size: int, grad: bool = True) -> torch.Tensor:
        return torch.randn(size, dtype=torch.float32, device=device).to(case.dtype).requires_grad_(grad)

    s, rows, width = case.shape, case.rows, case.width
    if case.op == "rms_norm":
        return normal(rows, width), normal(width), 1e-5
    if case.op == "add_rms_norm":
        return normal(rows, width), normal(rows, width), normal(width), 1e-5
    if case.op == "swiglu":
        return (normal(rows, 2 * width),)
    if case.op == "rope":
        qkv = normal(1, rows, s.heads + 2 * s.kv_heads, s.head_dim)
        angles = torch.rand(s.sequence, s.head_dim // 2, device=device) * 6.28
        positions = torch.arange(rows, device=device).remainder(s.sequence).view(1, -1)
        return qkv.narrow(2, 0, s.heads), qkv.narrow(2, s.heads, s.kv_heads), angles.cos(), angles.sin(), positions
    targets = torch.randint(0, width, (rows,), device=device)
    return normal(rows, width, grad=False), targets, torch.ones(rows, device=device)


def step_of(function: Function, case: Case, device: str) -> Step:
    """The timed step of one side on fresh inputs: its forward without a graph, or the backward of one made before."""
    arguments = inputs(case, device)
    if case.direction != "backward":

        def forward() -> Any:
            with torch.no_grad():
                return function(*arguments)

        return forward
    wanted = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)


def cuda_timer(step: Step) -> float:
    """Seconds of one step by CUDA events."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    step()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e-3


def wall_timer(step: Step) -> float:
    """Seconds of one step by the wall clock, for a CPU."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def median_seconds(make: Callable[[], Step], size: int, device: str, repeats: int) -> float:
    """Median seconds of `repeats` steps, their inputs rotated through as many sets of `size` bytes as pass the L2."""
    cuda = device.startswith("cuda")
    cache = torch.cuda.get_device_properties(device).L2_cache_size if cuda else 0
    steps = [make() for _ in range(max(2, min(16, 1 + 2 * cache // max(size, 1))))]
    timer = cuda_timer if cuda else wall_timer
    for step in steps:
        step()
    return statistics.median(timer(steps[i % len(steps)]) for i in range(repeats))


def copy_bandwidth(size: int, device: str, repeats: int) -> float:
    """GB/s of copying `size` bytes in all (half read, half written), measured as the kernels are."""

    def make() -> Step:
        source = torch.empty(max(size // 2, 1), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return size / median_seconds(make, size, device, repeats) / 1e9


def measure(case: Case, device: str, repeats: int = 50) -> list[Measured]:
    """Time every side of a case; ours first. The copy moves as many bytes as our kernels, in the same run."""
    moved = case.bytes(case.launches(device))
    copy = copy_bandwidth(moved, device, repeats)
    sides: dict[str, Function] = {"lumina": OURS[case.op], "eager": EAGER[case.op]}
    if device.startswith("cuda"):
        sides["compile"] = torch.compile(EAGER[case.op], dynamic=False)
        peer = liger().get(case.op)
        sides |= {"liger": peer} if peer else {}
    found = []
    for side, function in sides.items():
        seconds = median_seconds(functools.partial(step_of, function, case, device), moved, device, repeats)
        found.append(Measured(case, side, seconds * 1e6, moved / seconds / 1e9, moved / seconds / 1e9 / copy))
    return found


def environment() -> dict[str, str]:
    """What the figures were made on: device, driver and package versions."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["cuda"] = str(torch.version.cuda)
    return found
