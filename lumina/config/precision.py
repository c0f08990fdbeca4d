"""Precision: the number format that a run computes in, from what was asked for and what the device has.

`auto` takes bfloat16 where the device has it (float32's range: no loss scaling, no overflow), else float16 on a GPU and
float32 on a CPU. float16 needs a GPU: DeepSpeed's float16 path does not run on CPUs.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Literal

from lumina.config.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")

# /proc/cpuinfo flags of instructions that multiply bfloat16 (x86: AVX-512 BF16 and AMX; Arm: BF16 extension).
_CPU_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def resolve(precision: str, device_type: str, *, bf16_supported: bool | None = None) -> Precision:
    """The precision to train in.

    Args:
        precision: auto, fp32, bf16 or fp16.
        device_type: torch's device type, `cpu` or `cuda`.
        bf16_supported: whether the device multiplies bfloat16 natively; None asks the device.

    Raises:
        UserError: float16 on a CPU; bfloat16 on a GPU that lacks it. (A CPU without the instructions computes
            bfloat16 correctly but slowly, so there it is allowed when asked for.)
    """
    if precision not in ("auto", *PRECISIONS):
        raise UserError(f"unknown precision `{precision}`", "Use auto, fp32, bf16 or fp16.")
    if precision == "fp32":
        return "fp32"
    on_cpu = device_type == "cpu"
    if precision == "fp16":
        if on_cpu:
            raise UserError(
                "precision fp16 needs a GPU, and this run is on the CPU",
                "Use --precision auto (bf16 where the CPU has it, else fp32).",
            )
        return "fp16"
    if bf16_supported is None:
        bf16_supported = cpu_has_bf16() if on_cpu else _gpu_has_bf16()
    if precision == "bf16":
        if not on_cpu and not bf16_supported:
            raise UserError(
                "this GPU has no bfloat16 (compute capability 8.0 or newer has it)",
                "Use --precision fp16 or --precision auto.",
            )
        return "bf16"
    if bf16_supported:
        return "bf16"
    return "fp32" if on_cpu else "fp16"


def cpu_has_bf16() -> bool:
    """Whether this CPU has bfloat16 instructions, from /proc/cpuinfo; false where that is unknown."""
    if platform.system() == "Darwin":
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return bool(_CPU_BF16_FLAGS & set(flags.partition(":")[2].split()))


def _gpu_has_bf16() -> bool:
    import torch

    if not torch.cuda.is_available():
        raise UserError("no CUDA device is visible", "Check the driver and CUDA_VISIBLE_DEVICES, or train on the CPU.")
    if torch.version.hip is not None:
        return True  # every GPU that ROCm's PyTorch supports multiplies bfloat16
    return torch.cuda.get_device_capability()[0] >= 8
