"""Measuring a model: loss on conversations held out, and benchmark tasks."""

__all__ = ["tasks"]
