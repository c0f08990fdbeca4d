"""Preflight checks: the nodes' answers in, findings out. The preflight asks; nothing here touches a machine.

FAIL: training will not work, or not as a whole. WARN: it works, but slower or not as it should. Every finding but OK
says what to do. Where nodes differ, the odd ones out are named: what most have is right, and the head decides a tie.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from lumina.cluster.hostfile import Host
from lumina.plan import MIN_FREE_DISK, CheckResult, Status

Facts = Mapping[str, Any]
HEAD = "the head"
AREAS = ("ssh", "versions", "slots", "gpu", "network", "shared", "disk", "clock", "port", "all-reduce")
PACKAGES = ("lumina", "Python", "torch", "DeepSpeed", "CUDA", "NCCL")

FULL_DISK = 2**30  # bytes: not even one checkpoint of a small model
SKEW_WARN, SKEW_FAIL = 0.5, 5.0  # seconds beyond what the exchange leaves uncertain
SLOW_LATENCY = 5e-3  # seconds of the smallest all-reduce
SLOW_BANDWIDTH = 100e6  # bytes/s: less than a gigabit Ethernet gives


class NodeFinding(NamedTuple):
    """A finding and the node that it is about; its name is one of AREAS."""

    node: str
    finding: CheckResult


def found(node: str, level: Status, name: str, detail: str, remedy: str = "") -> NodeFinding:
    assert name in AREAS
    assert level == "OK" or remedy
    return NodeFinding(node, CheckResult(level, name, detail, remedy))


def majority(values: Mapping[str, Any], casting: Any = None) -> Any:
    """What most have; in a tie the casting vote, where it is one of the tied, else the first."""
    counts = Counter(values.values())
    most = max(counts.values())
    tied = [value for value, count in counts.items() if count == most]
    return casting if casting in tied else tied[0]


# --- Reaching a node ------------------------------------------------------------------------------

_SSH_REMEDIES = (
    (r"permission denied", "Put your key there: ssh-copy-id NODE. `ssh -o BatchMode=yes NODE true` must succeed."),
    (r"host key verification", "Its host key is new or has changed: ssh-keyscan NODE >> ~/.ssh/known_hosts."),
    (r"could not resolve|name or service not known", "Add its name to DNS or /etc/hosts, or correct the hostfile."),
    (r"connection refused", "The machine is up and no sshd listens: systemctl start ssh."),
    (r"no answer to the command", "`ssh NODE true` must return at once: does its shell's start file (~/.bashrc) wait "
     "for something, or does a file system hang? Else take it from the hostfile."),
    (r"timed out|no route|unreachable|no answer|host is down", "Is it up? Else take it from the hostfile."),
    (r"no module named", "Install Lumina there at the same path as here (the same virtual environment)."),
    (r"cd: ", "The folder you are in must exist on every node: work on the shared file system."),
    (r"python\S*: (no such file|not found|cannot execute)", "This Python must exist there, at the same path."),
)  # fmt: skip


def unreachable(node: str, error: str) -> NodeFinding:
    """A node that could not be asked at all; `error` is what ssh or Python said."""
    remedy = next((text for pattern, text in _SSH_REMEDIES if re.search(pattern, error, re.IGNORECASE)), None)
    return found(node, "FAIL", "ssh", error, remedy or "Try it by hand: ssh -o BatchMode=yes NODE true")


# --- What a node is -------------------------------------------------------------------------------


def versions(facts: Mapping[str, Facts], head: Mapping[str, str | None]) -> list[NodeFinding]:
    """The same of everything on all nodes, and the head's lumina like theirs."""
    right = {
        name: majority({n: f["versions"].get(name) for n, f in facts.items()}, head.get(name)) for name in PACKAGES
    }
    results = []
    for node, fact in facts.items():
        wrong = [found(node, "FAIL", "versions", f"torch cannot be imported: {fact['torch_error']}",
                       "Install it anew there; see the error.")] if fact["torch_error"] else []  # fmt: skip
        for name in PACKAGES:
            own, common = fact["versions"].get(name), right[name]
            if fact["torch_error"] and name in ("CUDA", "NCCL"):
                continue
            if own is None and name in ("torch", "DeepSpeed"):
                wrong.append(found(node, "FAIL", "versions", f"no {name}", f"Install {name} {common or ''} there."))
            elif own != common:
                level: Status = "WARN" if name == "Python" and _minor(own) == _minor(common) else "FAIL"
                detail = f"{name} {own or 'is not there'}, where the others have {common or 'none'}"
                wrong.append(found(node, level, "versions", detail, f"Install {name} {common or 'anew'} there."))
        listed = ", ".join(f"{name} {fact['versions'][name]}" for name in PACKAGES if fact["versions"].get(name))
        results += wrong or [found(node, "OK", "versions", listed)]
    for name in ("lumina", "Python"):
        same = head[name] == right[name] if name == "lumina" else _minor(head[name]) == _minor(right[name])
        if not same:
            detail = f"{name} {head[name]}, where the nodes have {right[name]}"
            remedy = f"Start from an installation like the nodes' ({name} {right[name]})."
            results.append(found(HEAD, "FAIL", "versions", detail, remedy))
    return results


def _minor(version: str | None) -> str | None:
    """3.11 of 3.11.7."""
    return version and ".".join(version.split(".")[:2])


def slots(hosts: list[Host], facts: Mapping[str, Facts]) -> list[NodeFinding]:
    """A GPU for each slot, without GPUs a core for each; and no machine under two names."""
    any_gpu = any(fact["visible"] for fact in facts.values())
    results = []
    for host in hosts:
        if host.name not in facts:
            continue
        fact, wanted = facts[host.name], host.slots
        twin = next(name for name, other in facts.items() if other["machine"] == fact["machine"])
        if twin != host.name:
            remedy = "Name each machine once, with all of its ranks: NAME slots=N"
            results.append(found(host.name, "FAIL", "slots", f"the same machine as {twin}", remedy))
            continue
        gpus, cores, cpus = fact["visible"], fact["cores"], fact["cpus"]
        if gpus:
            detail = f"slots={wanted}, {gpus} GPU(s)"
            if wanted == gpus:
                results.append(found(host.name, "OK", "slots", detail))
            elif wanted > gpus:
                remedy = f"Write slots={gpus} in the hostfile, or see with nvidia-smi there where the others are."
                results.append(found(host.name, "FAIL", "slots", detail, remedy))
            else:
                idle = f"{detail}: {gpus - wanted} would be idle"
                results.append(found(host.name, "WARN", "slots", idle, f"Write slots={gpus} in the hostfile."))
        elif any_gpu:
            detail = f"slots={wanted} and no GPU, where other nodes have some"
            remedy = "See nvidia-smi there (driver, CUDA_VISIBLE_DEVICES), or take the node from the hostfile."
            results.append(found(host.name, "FAIL", "slots", detail, remedy))
        elif wanted > cpus:
            detail = f"slots={wanted}, no GPU and only {cpus} CPU(s)"
            results.append(found(host.name, "FAIL", "slots", detail, f"Write slots={cores} or less in the hostfile."))
        elif wanted > cores:
            detail = f"slots={wanted}, no GPU and {cores} core(s) with {cpus} hardware threads: ranks share cores"
            results.append(found(host.name, "WARN", "slots", detail, f"Write slots={cores} or less in the hostfile."))
        elif fact["versions"].get("CUDA"):
            detail = f"no GPU seen, though this torch is for CUDA {fact['versions']['CUDA']}"
            results.append(found(host.name, "WARN", "slots", detail, "Meant to have some? See nvidia-smi there."))
        else:
            detail = f"slots={wanted}, no GPU: ranks on {cores} core(s)"
            results.append(found(host.name, "OK", "slots", detail))
    return results


def gpus(facts: Mapping[str, Facts]) -> list[NodeFinding]:
    """The same model, memory and highest clock on every GPU of every node: the slowest sets the pace of all."""
    every = {f"{node} {gpu['index']}": _kind(gpu) for node, fact in facts.items() for gpu in fact["gpus"]}
    if not every:
        return [found(node, "OK", "gpu", "none here") for node in facts]
    model, memory, clock = (majority({key: kind[part] for key, kind in every.items()}) for part in range(3))
    results = []
    for node, fact in facts.items():
        odd = []
        for gpu in fact["gpus"]:
            name, size, speed = _kind(gpu)
            if name != model:
                odd.append(f"GPU {gpu['index']} is {name}, where most are {model}")
            if size != memory:
                odd.append(f"GPU {gpu['index']} has {size} GiB, where most have {memory}")
            if speed != clock:
                odd.append(f"GPU {gpu['index']} clocks at most {speed} MHz, where most reach {clock}")
        if odd:
            remedy = (
                "The smallest and slowest GPU sets the batch and the pace of all; see nvidia-smi -q -d CLOCK,MEMORY."
            )
            results.append(found(node, "WARN", "gpu", "; ".join(odd), remedy))
        elif fact["gpus"]:
            detail = f"{len(fact['gpus'])} x {model}, {memory} GiB" + (f", {clock} MHz" if clock else "")
            results.append(found(node, "OK", "gpu", detail))
        else:
            results.append(found(node, "OK", "gpu", "none here"))
    return results


def _kind(gpu: Facts) -> tuple[str, float, int]:
    # Two cards of one model may differ by a page or so, retired because it was bad.
    return gpu["name"], round(gpu["memory"] / 2**30, 1), gpu["clock"]


def network(facts: Mapping[str, Facts]) -> list[NodeFinding]:
    """An interface on which the other nodes can be reached, of one kind everywhere."""
    kinds = {node: (fact["interface"] or {}).get("kind") for node, fact in facts.items()}
    common = majority(kinds) if kinds else None
    results = []
    for node, fact in facts.items():
        kind = kinds[node]
        if fact["network_error"]:
            remedy = "Check routes and /etc/hosts there, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."
            results.append(found(node, "FAIL", "network", fact["network_error"], remedy))
        elif kind == "loopback" and set(kinds.values()) != {"loopback"}:
            detail = f"ranks would talk over {fact['interface']['name']}, where no other machine hears them"
            remedy = "The hostfile must name it by a name that leads to its network, on every node (/etc/hosts)."
            results.append(found(node, "FAIL", "network", detail, remedy))
        elif kind != common:
            detail = f"{kind} ({fact['interface']['name']}), where most nodes have {common}"
            remedy = "Choose the same kind everywhere: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME."
            results.append(found(node, "WARN", "network", detail, remedy))
        elif bool(fact["infiniband"]) != (majority({n: bool(f["infiniband"]) for n, f in facts.items()})):
            detail = "InfiniBand is active on some nodes and not on others"
            results.append(found(node, "WARN", "network", detail, "See ibstat there: NCCL falls back to Ethernet."))
        else:
            results.append(found(node, "OK", "network", fact["summary"]))
    return results


# --- What they share ------------------------------------------------------------------------------


def shared(folder: str, answers: Mapping[str, Facts], head_saw: Mapping[str, bool]) -> list[NodeFinding]:
    """The output folder: the head's file seen on the node, the node's file seen on the head, room enough."""
    mount = f"Mount the same file system at {folder} on every node and here, or give --output-dir a folder on one."
    results = []
    for node, answer in answers.items():
        if not answer["there"]:
            results.append(found(node, "FAIL", "shared", f"{folder} is not there", mount))
            continue
        if answer["wrote"]:
            remedy = "Give yourself the right to write there on every node (same user id, mounted rw, root squash)."
            results.append(found(node, "FAIL", "shared", f"cannot write to {folder}: {answer['wrote']}", remedy))
        elif not answer["seen"]:
            results.append(found(node, "FAIL", "shared", f"{folder} is another folder here than on the head", mount))
        elif not head_saw[node]:
            detail = f"what is written to {folder} here is not seen on the head"
            results.append(found(node, "FAIL", "shared", detail, mount))
        else:
            results.append(found(node, "OK", "shared", f"{folder}: seen both ways, writable"))
        results.append(_disk(node, answer["free"]))
    return results


def _disk(node: str, free: int) -> NodeFinding:
    detail = f"{free / 2**30:.1f} GiB free"
    remedy = "Make room, give --output-dir a bigger disk, or a lower --keep-last."
    if free < FULL_DISK:
        return found(node, "FAIL", "disk", detail, remedy)
    if free < MIN_FREE_DISK:
        return found(node, "WARN", "disk", detail, remedy)
    return found(node, "OK", "disk", detail)


def clocks(offsets: Mapping[str, tuple[float, float]]) -> list[NodeFinding]:
    """`offsets`: of each node's clock against the head's, and the uncertainty of that, in seconds.

    The middle clock is the right one, of the nodes' and the head's; with a single node, the head's.
    """
    every = {HEAD: (0.0, 0.0), **offsets}
    right = statistics.median_low(offset for offset, _ in every.values()) if len(every) > 2 else 0.0
    results = []
    for node, (offset, uncertainty) in every.items():
        skew = offset - right
        beyond = abs(skew) - uncertainty
        detail = f"{abs(skew):.3f} s {'ahead' if skew > 0 else 'behind'} (+-{uncertainty:.3f} s)"
        remedy = "Set it by the network there: systemctl enable --now chrony (or ntpd); see chronyc tracking."
        if beyond > SKEW_WARN:
            results.append(found(node, "FAIL" if beyond > SKEW_FAIL else "WARN", "clock", detail, remedy))
        elif node != HEAD:
            results.append(found(node, "OK", "clock", detail))
    return results


# --- Between them ---------------------------------------------------------------------------------


def links(names: list[str], all_pairs_up_to: int = 8) -> list[tuple[str, str]]:
    """Who tries to connect to whom: everybody to everybody; of many nodes, each to the next and to the first."""
    if len(names) <= all_pairs_up_to:
        return [(a, b) for a in names for b in names if a != b]
    ring = list(zip(names, names[1:] + names[:1], strict=True))
    return list(dict.fromkeys([*ring, *((name, names[0]) for name in names[1:])]))


def ports(failed: Mapping[str, Mapping[str, str]], tried: Mapping[str, list[str]]) -> list[NodeFinding]:
    """`tried`: node -> the targets it tried to reach; `failed`: node -> {target: what went wrong}."""
    remedy = "Open TCP between all nodes and the head, every port (firewall, security group), and check their routes."
    results = []
    for node, targets in tried.items():
        if failed.get(node):
            detail = "; ".join(f"cannot connect to {target}: {error}" for target, error in failed[node].items())
            results.append(found(node, "FAIL", "port", detail, remedy))
        else:
            results.append(found(node, "OK", "port", f"reaches {_some(targets)}"))
    return results


def _some(names: list[str], most: int = 4) -> str:
    if not names:
        return "nobody: there is no other node"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def all_reduce(backend: str, answers: Mapping[str, Facts]) -> list[NodeFinding]:
    """One all-reduce over a rank on each node, small for its latency and large for its bandwidth."""
    results = []
    for node, answer in answers.items():
        detail = f"{backend}, {measured(answer)}"
        slow = answer["latency"] > SLOW_LATENCY or answer["bandwidth"] < SLOW_BANDWIDTH
        remedy = (
            "Slower than a gigabit Ethernet: is this the fast interface? Set NCCL_SOCKET_IFNAME and "
            "GLOO_SOCKET_IFNAME, look at NCCL_DEBUG=INFO, and whether something else uses machine or network."
        )
        results.append(found(node, "WARN" if slow else "OK", "all-reduce", detail, remedy if slow else ""))
    return results


def measured(answer: Facts) -> str:
    size = f"{answer['bytes'] / 2**20:.0f} MiB"
    return f"{answer['latency'] * 1e6:.0f} us for 4 bytes, {answer['bandwidth'] / 1e9:.2f} GB/s for {size}"
