"""Variable-length attention: the choice of the GPU kernel, and how it is called.

    flash4   FlashAttention 4 (package flash-attn-4, `flash_attn.cute`), on Blackwell and Hopper, through torch
    flash3   FlashAttention 3 (package `flash_attn_interface`), on Hopper, through torch
    flash2   FlashAttention 2 of the package flash-attn, on compute capability 8.0 and later
    torch    torch's own FlashAttention 2, there too
    sdpa     no such kernel: scaled-dot-product attention over groups of documents (attention.py)

torch calls 3 and 4 by itself once they are activated (`activate_flash_attention_impl`), forward and backward, under
`varlen_attn`, which torch.compile takes into its graphs. The newest that the card has is taken; LUMINA_ATTENTION forces
one. No card was at hand when this was written: the calls are held to the signatures of torch 2.13 and flash-attn 2.8 by
tests with stand-ins, and no speed was measured.

Shapes: S tokens, H query heads, K key/value heads, d head width, D documents; R rows of a cache, T its tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumina.config import UserError

log = logging.getLogger("lumina")

WAYS = ("auto", "flash2", "flash3", "flash4", "torch", "sdpa")


class Kernel(NamedTuple):
    """`attend(q_SHd, k_SKd, v_SKd, cu_seqlens_D, max_seqlen, window, scale)` -> (S, H, d), causal within documents.
    `window`: how many keys a query sees, its own the last; None: all of its document's past. `scale`: of q k^T; None:
    1 / sqrt(d)."""

    name: str
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, int, int | None, float | None], Tensor]


class _Implementation(NamedTuple):
    """What torch calls it, the module that it loads, the compute capabilities (major) that have it, what to install."""

    name: str
    module: str
    majors: tuple[int, ...]
    package: str


_ACTIVATED = {
    "flash4": _Implementation("FA4", "flash_attn.cute", (10, 9), "flash-attn-4"),
    "flash3": _Implementation("FA3", "flash_attn_interface", (9,), "FlashAttention 3 (its hopper folder)"),
}
_AUTOMATIC = {10: ("flash4",), 9: ("flash3",)}  # before flash2: a Hopper's 3 is faster than its 4 by its authors


def find(dtype: torch.dtype) -> Kernel | None:
    """The kernel for this type on this process's GPU, or None where there is none.

    Raises:
        UserError: LUMINA_ATTENTION names one that is not here.
    """
    way = os.environ.get("LUMINA_ATTENTION", "auto")
    if way not in WAYS:
        raise UserError(f"LUMINA_ATTENTION={way} is not a way.", f"Use one of {', '.join(WAYS)}, or unset it.")
    major, minor = torch.cuda.get_device_capability()
    if way == "sdpa" or dtype not in (torch.bfloat16, torch.float16) or major < 8:
        if way not in ("auto", "sdpa"):
            _refuse(way, f"it takes half precision on compute capability 8.0 and later, not {dtype} on {major}.{minor}")
        return None
    if way in _ACTIVATED:
        return _through_torch(way, major)
    if way == "auto":
        for newer in _AUTOMATIC.get(major, ()):
            if _present(_ACTIVATED[newer].module):
                try:
                    return _through_torch(newer, major)
                except UserError as error:  # there, but built for something else: the next best is taken
                    log.warning("%s", str(error).splitlines()[0])
    if way in ("auto", "flash2") and _present("flash_attn") and (package := _package()) is not None:
        return package
    if way == "flash2":
        _refuse(way, "the package flash-attn is not installed")
    return _torchs("torch's FlashAttention 2")


def _refuse(way: str, why: str) -> None:
    raise UserError(f"LUMINA_ATTENTION={way} cannot be had: {why}.", "Unset it: the best one here is then taken.")


def _present(module: str) -> bool:
    if sys.modules.get(module) is not None:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent package is missing
        return False


def _through_torch(way: str, major: int) -> Kernel:
    """Activate a newer FlashAttention under torch's own operators."""
    made = _ACTIVATED[way]
    if major not in made.majors:
        _refuse(way, f"it runs on compute capability {' and '.join(f'{m}.x' for m in made.majors)}, not {major}.x")
    if not _present(made.module):
        _refuse(way, f"{made.package} is not installed (no module {made.module})")
    activate = getattr(importlib.import_module("torch.nn.attention"), "activate_flash_attention_impl", None)
    if activate is None:
        _refuse(way, f"torch {torch.__version__} cannot activate it, 2.11 can")
    try:
        activate(made.name)  # type: ignore[misc]
    except (ImportError, RuntimeError, ValueError) as error:
        _refuse(way, str(error).splitlines()[0])
    return _torchs(f"FlashAttention {made.name[-1]} ({made.module}) through torch")


def _package() -> Kernel | None:
    try:
        module = importlib.import_module("flash_attn")
        attend = module.flash_attn_varlen_func
    except (ImportError, AttributeError):  # the name alone is there, as where only flash_attn.cute is installed
        return None

    def flash2(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, window: int | None, scale: float | None
    ) -> Tensor:
        options: dict[str, Any] = {} if window is None else {"window_size": (window - 1, 0)}
        if scale is not None:
            options["softmax_scale"] = scale
        if torch.are_deterministic_algorithms_enabled():
            options["deterministic"] = True
        out: Any = attend(q, k, v, cu, cu, longest, longest, causal=True, **options)
        return out  # type: ignore[no-any-return]

    return Kernel(f"FlashAttention {getattr(module, '__version__', '2')} (flash-attn)", flash2)


def _torchs(name: str) -> Kernel:
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    # The mask is a window that ends at the query since torch 2.11, a flag before.
    known = inspect.signature(varlen_attn).parameters
    windows, grouped = "window_size" in known, "enable_gqa" in known

    def own(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, window: int | None, scale: float | None
    ) -> Tensor:
        if (window is not None or scale is not None) and not windows:
            what = "no sliding windows and no scale of its own for this kernel"
            raise UserError(f"torch {torch.__version__} has {what}.", "Install torch 2.12 or later.")
        group = q.shape[1] // k.shape[1]
        if group > 1 and not grouped:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        left = -1 if window is None else window - 1
        options: dict[str, Any] = {"window_size": (left, 0)} if windows else {"is_causal": True}
        if grouped:
            options["enable_gqa"] = group > 1
        if scale is not None:
            options["scale"] = scale
        out: Any = varlen_attn(q, k, v, cu, cu, longest, longest, **options)
        return out  # type: ignore[no-any-return]

    return Kernel(name, own)


# --- Decoding -------------------------------------------------------------------------------------


class Spans(NamedTuple):
    """Where the keys of R queries, one each, lie in a cache of T tokens: int32 on the device. `queries` is 0 to R;
    `edges` (R + 1) where each row begins, and an end; `used` (R) how many tokens from there each query sees; `longest`
    the largest of those, on the host."""

    queries: Tensor
    edges: Tensor
    used: Tensor
    longest: int


def spans_kernel(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor, Spans, float | None], Tensor] | None:
    """`attend(q_RHd, k_TKd, v_TKd, spans, scale)` -> (R, H, d): one query for each row of a cache, over as many of the
    row's tokens as it holds, by torch's variable-length kernel and its `seqused_k` (torch 2.12). None where that is not
    to be had: there a mask says what each row sees, which the flash kernels refuse."""
    way = os.environ.get("LUMINA_ATTENTION", "auto")
    if way == "sdpa" or dtype not in (torch.bfloat16, torch.float16) or torch.cuda.get_device_capability() < (8, 0):
        return None
    try:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    if not {"seqused_k", "enable_gqa", "window_size"} <= inspect.signature(varlen_attn).parameters.keys():
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float | None) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        cu_q, cu_k, longest = spans.queries, spans.edges, spans.longest
        # No mask: what a query may see is what `used` counts, and a causal one would be aligned to its end anyway.
        options: dict[str, Any] = {} if scale is None else {"scale": scale}
        out: Any = varlen_attn(q, k, v, cu_q, cu_k, 1, longest, enable_gqa=grouped, seqused_k=spans.used, **options)
        return out  # type: ignore[no-any-return]

    return attend
