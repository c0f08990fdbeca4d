"""Builds, caches and binds `cpu_kernels.c`: the bfloat16 loops that dominate a training step on a CPU.

The source is compiled once per machine with the system's C compiler and kept in the user's cache, named after the
source and the processor. Without a compiler, or with LUMINA_CPU_KERNELS=0, `lib()` is None and plain torch is used,
with the same results and less speed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumina.files import atomic_file

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("cpu_kernels.c")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
_VOID_P, _I64, _F32, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES: dict[str, list[Any]] = {
    "lumina_cross_entropy": [_VOID_P] * 4 + [_I64] * 2 + [_INT],
    "lumina_causal_softmax": [_VOID_P] * 2 + [_I64] * 6 + [_F32, _INT, _INT],
    "lumina_softmax_backward": [_VOID_P] * 2 + [_I64] * 2 + [_F32, _INT],
    "lumina_rms_norm": [_VOID_P] * 6 + [_I64] * 2 + [_F32, _INT],
    "lumina_rms_norm_backward": [_VOID_P] * 7 + [_I64] * 2 + [_INT],
    "lumina_swiglu": [_VOID_P] * 2 + [_I64] * 2 + [_INT],
    "lumina_swiglu_backward": [_VOID_P] * 3 + [_I64] * 2 + [_INT],
    "lumina_rope": [_VOID_P] * 4 + [_I64] * 5 + [_F32, _INT],
}


def _processor() -> str:
    """What -march=native depends on: the model name and the feature flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.processor()


def _build(source: Path) -> Path | None:
    """Compile a source file, or find it compiled. None when there is no compiler or it fails."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        log.warning("no C compiler: the CPU runs plain torch operators, which is slower")
        return None
    flags = list(_FLAGS)
    if "avx512f" in _processor():
        flags.append("-mprefer-vector-width=512")
    text = source.read_text(encoding="utf-8")
    key = hashlib.sha256("\0".join([text, _processor(), *flags]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("LUMINA_CACHE", Path.home() / ".cache" / "lumina"))
    library = cache / f"{source.stem}-{key}.so"
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_file(library) as built:  # another rank may be building the same file
            subprocess.run([compiler, *flags, str(source), "-o", str(built), "-lm"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("cannot build the CPU kernels, plain torch is used: %s", getattr(error, "stderr", None) or error)
        return None
    return library


@functools.cache
def lib() -> ctypes.CDLL | None:
    """The compiled kernels of a training step, or None."""
    return open_library(_SOURCE, _SIGNATURES)


def open_library(source: Path, signatures: dict[str, list[Any]]) -> ctypes.CDLL | None:
    """Compiled functions and the types of their arguments, or None. torch is imported first, so that both share one
    OpenMP thread pool."""
    if os.environ.get("LUMINA_CPU_KERNELS", "1") == "0":
        return None
    path = _build(source)
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def usable(*tensors: Tensor) -> bool:
    """Whether the compiled kernels apply: bfloat16 on a CPU, outside of torch.compile's tracing."""
    on_cpu = all(t.device.type == "cpu" and t.dtype is torch.bfloat16 for t in tensors)
    return on_cpu and not torch.compiler.is_compiling() and lib() is not None


def call(name: str, *arguments: Tensor | float | int | None) -> None:
    """Call a kernel: tensors go as pointers (contiguity is the caller's part), None as NULL, the thread count last."""
    library = lib()
    assert library is not None
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(library, name)(*values, torch.get_num_threads())


def keep_heap() -> None:
    """Keep freed memory in the process instead of returning it to the kernel (glibc only, no effect elsewhere).

    By default glibc maps every large tensor afresh and the kernel zeroes its pages on first touch. At the debug shape
    that cost 0.15 s of a 0.24 s optimizer step and 0.12 s of a 0.24 s backward pass (two cores, DeepSpeed stage 0).
    Must be called before the first large allocation.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):  # not glibc
        return
