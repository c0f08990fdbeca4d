"""Lumina: trains conversational transformers with DeepSpeed, from one CPU core to a cluster."""

__version__ = "0.1.0"
