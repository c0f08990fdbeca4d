"""Makes Triton's interpreter convert to bfloat16 as GPUs do, to the nearest with ties to even; and less slow.

Triton 3.9's interpreter cuts the lower 16 bits off, which doubles a kernel's rounding error and hides whether it is as
exact as plain torch. Only float32 <-> bfloat16 is replaced; every other conversion is numpy's, which rounds.

Every call of a device function (tl.sum is one) goes through all members of triton.language again to redirect them to
numpy. Once per launch is enough: twenty steps of a small model took a third less time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _to_bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The upper halves, as uint16, of float32 values rounded to the nearest (ties to even); NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _to_float32(halves: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """bfloat16 values kept as uint16, as float32: exact."""
    return (np.ascontiguousarray(halves).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def install() -> None:
    """Replace the interpreter's conversions, once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "lumina_rounds", False):
        return
    original = builder.cast_impl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        pair = source.dtype.scalar, target.scalar
        if pair == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_to_bfloat16(source.data).reshape(source.data.shape), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_to_float32(source.data).reshape(source.data.shape), tl.float32)
        return original(self, source, target)

    builder.cast_impl = cast_impl
    _index_by_one_element()
    _patch_once_per_launch()
    builder.lumina_rounds = True


def _index_by_one_element() -> None:
    """Scalars are arrays of one element there: Triton 3.6 takes int() of one, which NumPy 2.4 refuses."""
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch


def _patch_once_per_launch() -> None:
    redirected: set[int] = set()
    launch, function = interpreter.GridExecutor, interpreter.InterpretedFunction
    whole_launch = launch.__call__

    def run(self: Any, *arguments: Any, **keywords: Any) -> None:
        redirected.clear()
        try:
            whole_launch(self, *arguments, **keywords)
        finally:
            redirected.clear()

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        languages = {id(value) for value in self.fn.__globals__.values() if value is tl or value is tl.core}
        if not languages <= redirected:
            interpreter._patch_lang(self.fn)
            redirected.update(languages)
        return self.rewrite()(*arguments, **keywords)

    launch.__call__, function.__call__ = run, call
