"""Samples could not be read."""

from __future__ import annotations

from lumina.train.health.rule import ReportedRule


class CorruptSample(ReportedRule):
    settings = ("on_corrupt_sample",)


RULE = CorruptSample
