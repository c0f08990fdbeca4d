"""The plan room's commands: work something out, print it for a reader or as JSON, return the exit code."""

from __future__ import annotations

import argparse
import json as json_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lumina.config import Config


def check_environment_command(*, json: bool = False) -> int:
    """Print what was found; 0 when nothing FAILs, else 1."""
    import contextlib
    import sys

    from lumina.plan.environment import check_all

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints while it is imported
        findings = check_all()
    failed = [finding for finding in findings if finding.level == "FAIL"]
    if json:
        print(json_module.dumps({"ok": not failed, "findings": [finding._asdict() for finding in findings]}))
    else:
        for finding in findings:
            remedy = f"  -> {finding.remedy}" if finding.remedy else ""
            print(f"{finding.level:4}  {finding.name:22} {finding.detail}{remedy}")
        warned = sum(finding.level == "WARN" for finding in findings)
        print(f"\n{len(findings)} checks: {len(failed)} failed, {warned} warnings")
    return 1 if failed else 0


def plan_command(config: Config, arguments: argparse.Namespace) -> int:
    """Print the fastest way to train on the cluster that fits; 1 when none does."""
    from lumina.plan.advice import plan

    return plan(config, arguments)


def estimate_time_command(config: Config, arguments: argparse.Namespace) -> int:
    """Print the estimate for the cluster that the arguments describe."""
    from lumina.plan.report import estimate

    return estimate(config, arguments)
