"""A backup could not be written."""

from __future__ import annotations

from lumina.train.health.rule import ReportedRule


class BackupFailed(ReportedRule):
    settings = ("save_timeout_minutes",)


RULE = BackupFailed
