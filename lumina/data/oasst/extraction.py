"""OpenAssistant message trees -> conversations.

A tree's candidates are its root-to-leaf paths (`all`, `best`) or its root-to-assistant prefixes (`prefixes`). Every
candidate that is not taken is counted under the first of these reasons that applies, in this order:

    tree state              the tree's state is not among `tree_states` (a tree without one passes)
    deleted, synthetic      a message on the path is, and it is not asked for
    rejected prompt         a prompter message on the path has review_result false (null passes)
    language                a message on the path is in none of `languages`
    low quality, toxic      a message's label lies below min_quality or above max_toxicity (without the label: passes)
    roles do not alternate  the path is not prompter, assistant, prompter, …
    rank                    `all` with top_k: an assistant message's rank is not below K, or it is unranked and has a
                            sibling
    no assistant reply      nothing is left to train on
    unanswered sibling      `all`: the path ends in an unanswered prompter message that is not the first reply to its
                            parent, in the tree's order and whatever those before it are. Where it is the first, or
                            with `best`, the path loses that message and is taken: what the training code of
                            Open-Assistant (model_training/custom_datasets/oasst_dataset.py) does, so that its counts
                            are met
    not the best            `best` takes one path a tree: at each step the reply of lowest rank, unranked ones last,
                            ties by order, among the replies that an admissible path goes through
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lumina.data.oasst.trees import Node

THREADS = ("all", "best", "prefixes")
ROLES = {"prompter": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class OasstOptions:
    """What to take; see the module's list of reasons."""

    threads: str = "all"
    top_k: int | None = None
    languages: frozenset[str] = frozenset()
    tree_states: frozenset[str] = frozenset({"ready_for_export"})
    include_deleted: bool = False
    include_synthetic: bool = False
    min_quality: float | None = None
    max_toxicity: float | None = None

    def __post_init__(self) -> None:
        assert self.threads in THREADS
        assert self.top_k is None or (self.threads == "all" and self.top_k >= 1)


@dataclass
class Extraction:
    """Conversations as messages records with their provenance, and the discarded candidates by reason."""

    records: list[dict[str, Any]] = field(default_factory=list)
    discarded: Counter[str] = field(default_factory=Counter)


def label(node: Node, name: str) -> float | None:
    """A label's value: from {name: {value, count}}, or from the hub's parallel lists."""
    labels = node.get("labels")
    if not isinstance(labels, dict):
        return None
    names, values = labels.get("name"), labels.get("value")
    if isinstance(names, list) and isinstance(values, list):
        value = dict(zip(names, values, strict=False)).get(name)
    else:
        entry = labels.get(name)
        value = entry.get("value") if isinstance(entry, dict) else None
    return float(value) if isinstance(value, int | float) else None


def leaf_paths(root: Node) -> Iterator[list[Node]]:
    """Every root-to-leaf path, depth first, replies in their order. Iterative: trees may be deeper than the stack."""
    stack: list[list[Node]] = [[root]]
    while stack:
        path = stack.pop()
        replies = path[-1].get("replies") or []
        if not replies:
            yield path
        stack.extend([*path, reply] for reply in reversed(replies))


def assistant_prefixes(root: Node) -> Iterator[list[Node]]:
    """Every path from the root to an assistant message, depth first."""
    stack: list[list[Node]] = [[root]]
    while stack:
        path = stack.pop()
        if path[-1]["role"] == "assistant":
            yield path
        stack.extend([*path, reply] for reply in reversed(path[-1].get("replies") or []))


def objection(path: list[Node], options: OasstOptions) -> str | None:
    """The first reason why a path cannot be taken as it stands, or None."""
    if not options.include_deleted and any(node.get("deleted") for node in path):
        return "deleted"
    if not options.include_synthetic and any(node.get("synthetic") for node in path):
        return "synthetic"
    if any(node["role"] == "prompter" and node.get("review_result") is False for node in path):
        return "rejected prompt"
    if options.languages and any(node.get("lang") not in options.languages for node in path):
        return "language"
    if options.min_quality is not None:
        low = options.min_quality
        if any((quality := label(node, "quality")) is not None and quality < low for node in path):
            return "low quality"
    if options.max_toxicity is not None:
        high = options.max_toxicity
        if any((toxicity := label(node, "toxicity")) is not None and toxicity > high for node in path):
            return "toxic"
    if any(node["role"] != ("assistant" if i % 2 else "prompter") for i, node in enumerate(path)):
        return "roles do not alternate"
    if options.top_k is not None:
        for parent, node in pairwise(path):
            alone = len(parent["replies"]) == 1
            rank = node.get("rank")
            if node["role"] == "assistant" and not (alone if rank is None else rank < options.top_k):
                return "rank"
    if len(path) < 2:
        return "no assistant reply"
    return None


def extract(tree: dict[str, Any], options: OasstOptions) -> Extraction:
    """The conversations of one well-formed tree (`malformed` says None)."""
    result = Extraction()
    root, prefixes = tree["prompt"], options.threads == "prefixes"
    state = tree.get("tree_state")
    admissible: list[list[Node]] = []
    for path in assistant_prefixes(root) if prefixes else leaf_paths(root):
        wrong_state = state is not None and state not in options.tree_states
        reason = "tree state" if wrong_state else objection(path, options)
        if reason is not None:
            result.discarded[reason] += 1
        else:
            admissible.append(path)
    if options.threads == "best" and admissible:
        result.discarded["not the best"] += len(admissible) - 1
        admissible = [min(admissible, key=_preference)]
    for path in admissible:
        if path[-1]["role"] == "prompter":
            if options.threads == "all" and path[-2]["replies"][0] is not path[-1]:
                result.discarded["unanswered sibling"] += 1
                continue
            path = path[:-1]
        result.records.append(_record(tree, path, last_only=prefixes))
    result.discarded += Counter()  # drops zero counts
    return result


def _preference(path: list[Node]) -> list[tuple[bool, int, int]]:
    """Sorts paths by the rank of their reply at each step, unranked last, ties by order."""
    steps = []
    for parent, node in pairwise(path):
        order = next(i for i, reply in enumerate(parent["replies"]) if reply is node)
        rank = node.get("rank")
        steps.append((rank is None, rank or 0, order))
    return steps


def _record(tree: dict[str, Any], path: list[Node], last_only: bool) -> dict[str, Any]:
    """The messages record of a path, with where it came from."""
    messages: list[dict[str, Any]] = []
    for node in path:
        message: dict[str, Any] = {"role": ROLES[node["role"]], "content": node["text"]}
        if last_only and node["role"] == "assistant" and node is not path[-1]:
            message["weight"] = 0
        messages.append(message)
    tree_id = tree.get("message_tree_id") or path[0].get("message_tree_id") or path[0].get("message_id")
    return {
        "messages": messages,
        "tree_id": tree_id,
        "message_ids": [node.get("message_id") for node in path],
        "ranks": [node.get("rank") for node in path],
        "lang": path[0].get("lang"),
    }
