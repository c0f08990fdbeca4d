"""Preflight report: the findings, the nodes' facts and the all-reduce's measurements."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lumina.cluster.hostfile import Host
from lumina.cluster.preflight.checks import NodeFinding

Answers = dict[str, dict[str, Any]]  # by node


@dataclass
class Report:
    """What was found; `facts` are the nodes' own, `reduced` their measurements."""

    hosts: list[Host]
    findings: list[NodeFinding] = field(default_factory=list)
    facts: Answers = field(default_factory=dict)
    reduced: Answers = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(item.finding.level != "FAIL" for item in self.findings)
