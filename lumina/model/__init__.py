"""The decoder, its operators, its losses and its adapters. Knows only torch, the kernels and the model's configuration.

Everything is loaded when it is asked for, since the families (lumina.model.families) are wanted without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lumina.model.attention import report_kernel as report_kernel
    from lumina.model.cache import KVCache as KVCache
    from lumina.model.cpu import keep_heap as keep_heap
    from lumina.model.decode import Decoder as Decoder
    from lumina.model.transformer import Transformer as Transformer

_HOMES = {
    "Decoder": "decode",
    "KVCache": "cache",
    "Transformer": "transformer",
    "keep_heap": "cpu",
    "report_kernel": "attention",
}
_MODULES = ("families", "float8", "lora", "ops")

__all__ = ["Decoder", "KVCache", "Transformer", "families", "float8", "keep_heap", "lora", "ops", "report_kernel"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"lumina.model.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"lumina.model.{name}")
    raise AttributeError(f"module {__name__} has no attribute {name}")
