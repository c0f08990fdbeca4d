"""Lumina's fused Triton kernels, as `torch.library` operators `lumina::...`; installed as `lumina.kernels`.

    from lumina import kernels
    kernels.AVAILABLE                                   # False where Triton is not installed
    kernels.rms_norm(x, weight, eps)
    kernels.add_rms_norm(x, residual, weight, eps)      # (normed, new residual)
    kernels.rope(q, k, cos, sin, positions)             # (q, k), new; rope_ rotates in place
    kernels.swiglu(gate_up)
    kernels.cross_entropy_(logits, targets, weights)    # losses; logits become their gradient

CUDA tensors, or CPU tensors in Triton's interpreter (`LUMINA_KERNELS=interpret` before the import). Without Triton the
import still works, and so does `kernels.reference`; using a kernel then raises ImportError with the remedy.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from . import reference

# Both must be set before triton is imported. The interpreter is chosen where a kernel is decorated, and the default
# of FP fusion changes between Triton 3.9 and 3.10: we state it, so that numbers do not depend on the release.
if os.environ.get("LUMINA_KERNELS") == "interpret":
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

#: Whether Triton is installed; whether a device can run it is another question.
AVAILABLE: bool = find_spec("triton") is not None
#: The oldest Triton that the kernels were compiled and interpreted with; 3.3 lacks `triton.knobs`, and 3.4 and 3.5 were
#: not tried.
OLDEST_TRITON = (3, 6)


def _refuse_old_triton() -> None:
    """ImportError, with the remedy, for a Triton older than `OLDEST_TRITON`."""
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        raise ImportError(
            f"lumina.kernels needs Triton {oldest} or newer, and {triton.__version__} is installed: pip install "
            f"'triton>={oldest}' (a CUDA build of torch brings its own: then pip install 'torch>=2.11'), or use the "
            "plain torch path (LUMINA_KERNELS=torch)"
        )


__all__ = ["AVAILABLE", "add_rms_norm", "cross_entropy_", "reference", "rms_norm", "rope", "rope_", "swiglu"]

if AVAILABLE:
    _refuse_old_triton()
if TYPE_CHECKING or AVAILABLE:
    from .cross_entropy import cross_entropy_
    from .rms_norm import add_rms_norm, rms_norm
    from .rope import rope, rope_
    from .swiglu import swiglu
else:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError(
                f"lumina.kernels.{name} needs Triton, which is not installed: pip install triton, or use the plain "
                "torch path (LUMINA_KERNELS=torch)"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
