"""A checkpoint could not be written; the older ones stay."""

from __future__ import annotations

from lumina.train.health.rule import ReportedRule


class SaveFailed(ReportedRule):
    settings = ("save_timeout_minutes",)


RULE = SaveFailed
