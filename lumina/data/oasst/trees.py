"""OpenAssistant message trees: what a message and a tree have to hold, and trees put together from single messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Node = dict[str, Any]


def is_flat_oasst(record: Any) -> bool:
    """Whether a record is a single OASST message, linked to its tree by parent_id."""
    return (
        type(record) is dict
        and type(record.get("message_id")) is str
        and type(record.get("text")) is str
        and type(record.get("role")) is str
        and "replies" not in record
    )


def is_message(node: Any) -> bool:
    """Whether a value has what extraction needs of a message."""
    return (
        isinstance(node, dict)
        and isinstance(node.get("text"), str)
        and isinstance(node.get("role"), str)
        and isinstance(node.get("replies") or [], list)
    )


def malformed(tree: Any) -> str | None:
    """Why a tree cannot be used, or None: every node must be a message."""
    if not isinstance(tree, dict) or not isinstance(tree.get("prompt"), dict):
        return "no `prompt` message"
    stack = [tree["prompt"]]
    while stack:
        node = stack.pop()
        if not is_message(node):
            return "a message without text, role or a list of replies"
        stack.extend(node.get("replies") or [])
    return None


def trees_of(rows: Iterable[Node]) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """Flat messages in any order -> trees, in the order of their roots; replies in the order of their rows.

    All rows are in memory: a flat export can name a parent anywhere. Rows carry their `_number`. Returns the trees,
    and number and reason of every row left over ("duplicate message_id", "parent missing" for those without a way to
    a root).
    """
    nodes: dict[Any, Node] = {}
    left: list[tuple[int, str]] = []
    for row in rows:
        if row["message_id"] in nodes:
            left.append((row["_number"], "duplicate message_id"))
        else:
            nodes[row["message_id"]] = {**row, "replies": []}
    roots = []
    for node in nodes.values():
        if node.get("parent_id") is None:
            roots.append(node)
        elif node["parent_id"] in nodes:
            nodes[node["parent_id"]]["replies"].append(node)
    reached: set[int] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        reached.add(node["_number"])
        stack.extend(node["replies"])
    left += [(node["_number"], "parent missing") for node in nodes.values() if node["_number"] not in reached]
    trees = [
        {
            "message_tree_id": root.get("message_tree_id") or root["message_id"],
            "tree_state": root.get("tree_state"),
            "prompt": root,
        }
        for root in roots
    ]
    return trees, sorted(left)
