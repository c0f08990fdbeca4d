"""A rank is slower than the others."""

from __future__ import annotations

from lumina.train.health.rule import ReportedRule


class Straggler(ReportedRule):
    pass


RULE = Straggler
