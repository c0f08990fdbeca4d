"""Static analysis of the compiled kernels, for cards that are not here.

Triton compiles to a cubin without a GPU; its own cuobjdump then tells registers, stack (spilled registers), shared
memory and the width of every load and store. Occupancy follows from the CUDA programming guide's limits per
multiprocessor, and the predicted time from the bytes moved and a given bandwidth: a bound, not a measurement.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .benchmark import BENCHMARKS, Case
from .launch import INTERPRETED, Launch, planned_for

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

#: Accesses below 128 bits that a kernel is allowed, by its name.
NARROW_ALLOWED = {kernel: most for each in BENCHMARKS.values() for kernel, most in each.narrow.items()}


@dataclass(frozen=True)
class Card:
    """A GPU: multiprocessors, peak memory bandwidth in GB/s, shared memory per multiprocessor in bytes."""

    name: str
    capability: int
    multiprocessors: int
    bandwidth: float
    shared: int
    registers: int = 65536
    warps: int = 64
    programs: int = 32


#: NVIDIA's data sheets: A100 SXM 80 GB, H100 SXM, B200.
CARDS = (
    Card("A100", 80, 108, 2039.0, 164 * 1024),
    Card("H100", 90, 132, 3350.0, 228 * 1024),
    Card("B200", 100, 148, 8000.0, 228 * 1024),
)


@dataclass(frozen=True)
class Resources:
    """One compiled kernel. `registers` per thread; `spills` in bytes per thread; `shared` in bytes per program; `wide`
    and `narrow`: load and store instructions of 128 bits, and of fewer."""

    kernel: str
    warps: int
    registers: int
    spills: int
    shared: int
    wide: int
    narrow: int

    def occupancy(self, card: Card) -> float:
        """Resident warps over the most that a multiprocessor holds (registers are dealt to warps 256 at a time)."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = card.registers // per_warp // self.warps
        by_shared = card.shared // (self.shared + 1024)
        return min(by_registers, by_shared, card.programs, card.warps // self.warps) * self.warps / card.warps

    def problems(self) -> list[str]:
        """What breaks the budget: any spill, a narrow access to a streamed tensor, more than 128 registers."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        allowed = NARROW_ALLOWED.get(self.kernel, 0)
        if self.narrow > allowed:
            found.append(f"{self.narrow} accesses below 128 bits, {allowed} allowed")
        if not self.wide:
            found.append("no access of 128 bits")
        if self.registers > 128:
            found.append(f"{self.registers} registers, 128 allowed")
        return found


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Types, constants and alignment of a launch's arguments, specialised as Triton's launcher does it."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int], Any] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.constants[name] if name in launch.constants else launch.args[index]
        if name in launch.constants or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned[(index,)] = [["tt.divisibility", 16]]
    return types, constants, aligned


_compiled: dict[str, Resources] = {}


def inspect(launch: Launch, capability: int) -> Resources:
    """Compile a launch for a compute capability (80, 90, 100) and read the cubin. RuntimeError in the interpreter."""
    if INTERPRETED:
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET to compile them")
    types, constants, aligned = signature(launch)
    key = f"{launch.kernel.__name__} {types} {constants} {sorted(aligned)} {launch.warps} {capability}"
    if key not in _compiled:
        compiled = triton.compile(
            ASTSource(launch.kernel, types, constants, aligned),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": launch.warps},
        )
        _compiled[key] = _read_cubin(
            launch.kernel.__name__, launch.warps, compiled.asm["cubin"], compiled.metadata.shared
        )
    return _compiled[key]


@functools.cache
def _tool(name: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{name} did not come with this Triton ({path}); install triton from PyPI")
    return str(path)


def _output(tool: str, *words: str) -> str:
    return subprocess.run([_tool(tool), *words], capture_output=True, text=True, check=True).stdout


def _read_cubin(kernel: str, warps: int, cubin: bytes, shared: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        # Without its analysis of branches, which nothing here reads, the disassembler takes half the time.
        text = _output("nvdisasm", "-c", "-ndf", "-novliw", file.name)
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if used is None:
        raise RuntimeError(f"cuobjdump tells no resources of {kernel}")
    accesses = re.findall(r"\b(?:LDG|STG|LDGSTS)\.[.\w]+", text)
    local = re.findall(r"\b(?:LDL|STL)\b", text)
    wide = sum(".128" in access for access in accesses)
    spills = int(used[2]) + int(used[3]) + 4 * len(local)
    return Resources(kernel, warps, int(used[1]), spills, shared, wide, len(accesses) - wide)


@dataclass(frozen=True)
class Row:
    """One kernel of one case on one card. `bytes` and `limit` are per element of the case, `microseconds` the time that
    moving its bytes takes at the card's bandwidth: all three are of the whole case, on its first kernel's row only."""

    case: Case
    card: Card
    resources: Resources
    bytes: float | None
    limit: float | None
    microseconds: float | None

    def fields(self) -> dict[str, str | int | float | None]:
        """Flat, for CSV and the printed table."""
        r = self.resources
        return {
            "card": self.card.name,
            "sm": self.card.capability,
            "shape": self.case.shape.name,
            "op": self.case.op,
            "direction": self.case.direction,
            "dtype": str(self.case.dtype).removeprefix("torch."),
            "rows": self.case.rows,
            "width": self.case.width,
            "kernel": r.kernel,
            "warps": r.warps,
            "registers": r.registers,
            "spills": r.spills,
            "shared": r.shared,
            "wide": r.wide,
            "narrow": r.narrow,
            "occupancy": round(r.occupancy(self.card), 3),
            "bytes_per_element": None if self.bytes is None else round(self.bytes, 3),
            "limit_per_element": self.limit,
            "predicted_us": None if self.microseconds is None else round(self.microseconds, 2),
        }


def rows_of(case: Case, card: Card, bandwidth: float | None = None) -> list[Row]:
    """The rows of a case on a card; `bandwidth` in GB/s replaces the card's."""
    with planned_for(card.multiprocessors):
        launches = case.launches()
    moved = case.bytes(launches)
    seconds = moved / ((bandwidth or card.bandwidth) * 1e9)
    resources = [inspect(launch, card.capability) for launch in launches]
    first = Row(case, card, resources[0], moved / case.elements, case.limit / case.elements, seconds * 1e6)
    return [first, *(Row(case, card, r, None, None, None) for r in resources[1:])]
