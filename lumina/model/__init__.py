"""The decoder and its operators. Knows only torch, the kernels and the shape part of the configuration."""

from lumina.model import lora
from lumina.model.cpu import keep_heap
from lumina.model.transformer import Transformer

__all__ = ["Transformer", "keep_heap", "lora"]
