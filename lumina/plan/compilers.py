"""The compilers that a run may need, looked for before it starts: the C compiler of this machine, and the C++ one.

Who asks for which, read in their sources: DeepSpeed's operators and torch.compile on a CPU take CXX, else g++ (torch
2.13, `cpp_extension.get_cxx_compiler`, `_inductor.config.cpp.cxx`); Triton's launcher, which torch.compile uses on a
GPU, takes CC, else clang or gcc.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

from lumina.config import UserError

_REMEDY = "apt-get install g++ (or build-essential), or set {} to a compiler that is there."


def cxx_compiler() -> str | None:
    """The C++ compiler's path, None when there is none, or CXX names one that is not there."""
    return _find("CXX", ("g++", "c++"))


def c_compiler() -> str | None:
    """The C compiler's path, None when there is none, or CC names one that is not there."""
    return _find("CC", ("gcc", "clang", "cc"))


def _find(variable: str, usual: tuple[str, ...]) -> str | None:
    chosen = os.environ.get(variable, "").split()  # it may hold options: "ccache g++"
    return next((found for name in (chosen[:1] or usual) if (found := shutil.which(name))), None)


def refuse_missing_compiler(compiled: bool, document: dict[str, Any], on_gpu: bool) -> None:
    """UserError where a run needs a compiler that is not here: torch.compile, or an optimizer that DeepSpeed keeps on
    the CPU. `document`: DeepSpeed's JSON."""
    zero = document.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, dict) else None
    offloaded = isinstance(offload, dict) and offload.get("device", "none") != "none"
    if compiled and on_gpu and c_compiler() is None:
        raise UserError(
            "--compile needs a C compiler, and none is found here", f"{_REMEDY.format('CC')} Or leave --compile out."
        )
    if compiled and not on_gpu and cxx_compiler() is None:
        raise UserError(
            "--compile needs a C++ compiler, and none is found here",
            f"{_REMEDY.format('CXX')} Or leave --compile out.",
        )
    if offloaded and cxx_compiler() is None:
        raise UserError(
            "offload_optimizer needs a C++ compiler for DeepSpeed's CPU Adam, and none is found here",
            f"{_REMEDY.format('CXX')} Or take offload_optimizer out of the DeepSpeed JSON.",
        )
