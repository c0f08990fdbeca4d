"""Preflight output: the findings as a table with remedies, and as JSON."""

from __future__ import annotations

from typing import Any

from lumina.cluster.preflight.checks import AREAS, HEAD
from lumina.cluster.preflight.report import Report
from lumina.cluster.topology import rank_map, recommended
from lumina.config import PRESETS, load
from lumina.plan import CheckResult
from lumina.terminal import say

_ORDER = ("OK", "WARN", "FAIL")


def as_dict(report: Report) -> dict[str, Any]:
    """ok, nodes {name: facts}, findings [{node, level, name, detail, remedy}], all_reduce {name: measurements}."""
    findings = [{"node": item.node, **item.finding._asdict()} for item in report.findings]
    zero = {preset: settings for presets, settings in advice(report) for preset in presets}
    return {"ok": report.ok, "nodes": report.facts, "findings": findings, "all_reduce": report.reduced, "zero": zero}


def advice(report: Report) -> list[tuple[list[str], dict[str, Any]]]:
    """ZeRO settings that suit the presets on the nodes that answered (lumina.cluster.topology.recommended); presets
    with the same ones together. One that fits in no way is left out."""
    hosts = [host for host in report.hosts if report.facts.get(host.name)]
    if not hosts:
        return []
    slots = min(host.slots for host in hosts)
    found = [report.facts[host.name] for host in hosts]
    memory = min(min((gpu["memory"] for gpu in facts["gpus"]), default=facts["memory"] // slots) for facts in found)
    grouped: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for preset in PRESETS:
        settings = recommended(len(hosts), slots, 2.0 * load(preset).num_parameters(), memory)
        if "offload_optimizer" in settings and not any(facts["gpus"] for facts in found):
            continue  # there is nothing to offload from: it does not fit
        grouped.setdefault(str(settings), ([], settings))[0].append(preset)
    return list(grouped.values())


def show(report: Report) -> None:
    for line in table(report):
        say(line)
    say()
    for finding, nodes in problems(report):
        say(f"{finding.level:4}  {', '.join(nodes)}: {finding.name}: {finding.detail}\n      -> {finding.remedy}")
    for line in dict.fromkeys(
        f"{item.finding.name}: {item.finding.detail}"
        for item in report.findings
        if item.finding.level == "OK" and item.finding.name in ("versions", "all-reduce")
    ):
        say(line)
    say("\n" + "\n".join(rank_map([(host.name, host.slots) for host in report.hosts])))
    for presets, settings in advice(report):
        say(f"ZeRO for {', '.join(presets)} on this cluster: {settings}")
    levels = [item.finding.level for item in report.findings]
    failed, warned = levels.count("FAIL"), levels.count("WARN")
    say(f"\n{len(report.hosts)} node(s), {len(levels)} checks: {failed} failed, {warned} warnings")


def table(report: Report) -> list[str]:
    """A row for each node: the worst of each area, - where it was not asked."""
    worst: dict[tuple[str, str], str] = {}
    for node, finding in report.findings:
        before = worst.get((node, finding.name), "OK")
        worst[node, finding.name] = max(before, finding.level, key=_ORDER.index)
    names = [host.name for host in report.hosts]
    if any(item.node == HEAD for item in report.findings):
        names.insert(0, HEAD)
    rows = [["node", *AREAS], *([name, *(worst.get((name, area), "-") for area in AREAS)] for name in names)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def problems(report: Report) -> list[tuple[CheckResult, list[str]]]:
    """What is not OK, the worst first; the same on several nodes is said once."""
    nodes: dict[CheckResult, list[str]] = {}
    for node, finding in report.findings:
        if finding.level != "OK":
            nodes.setdefault(finding, []).append(node)
    return sorted(nodes.items(), key=lambda item: -_ORDER.index(item[0].level))
