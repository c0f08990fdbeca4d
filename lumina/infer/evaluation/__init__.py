"""Measuring a model: loss on conversations held out, and benchmark tasks."""
