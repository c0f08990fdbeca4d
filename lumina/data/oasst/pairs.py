"""OpenAssistant message trees -> preference pairs: two replies to the same prompt, of which people ranked one higher.

The candidates are all pairs of assistant replies to one message. Every one that is not taken is counted under the first
of these reasons that applies, in this order:

    tree state              the tree's state is not among `tree_states` (a tree without one passes)
    (those of a path)       either reply's path from the root cannot be taken: lumina.data.oasst.extraction.objection
    unranked                either reply has no rank
    same rank               so neither was preferred
    same text               so there is nothing to tell apart

A reply alone under its message makes no candidate.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from lumina.data.oasst.extraction import ROLES, Extraction, OasstOptions, objection
from lumina.data.oasst.trees import Node


def extract_pairs(tree: dict[str, Any], options: OasstOptions) -> Extraction:
    """The pairs of one well-formed tree (extraction.malformed says None), depth first.

    The records are as TRL has them: `prompt`, `chosen` and `rejected` are lists of messages.
    """
    assert options.threads == "all"
    assert options.top_k is None
    result = Extraction()
    state = tree.get("tree_state")
    wrong_state = state is not None and state not in options.tree_states
    stack: list[list[Node]] = [[tree["prompt"]]]
    while stack:
        path = stack.pop()
        replies = path[-1].get("replies") or []
        stack.extend([*path, reply] for reply in reversed(replies))
        answers = [reply for reply in replies if reply["role"] == "assistant"]
        if len(answers) < 2:
            continue
        objections = {id(answer): objection([*path, answer], options) for answer in answers}
        for one, other in combinations(answers, 2):
            reason = "tree state" if wrong_state else objections[id(one)] or objections[id(other)]
            reason = reason or _undecided(one, other)
            if reason is not None:
                result.discarded[reason] += 1
                continue
            chosen, rejected = sorted((one, other), key=lambda answer: int(answer["rank"]))
            result.records.append(_record(tree, path, chosen, rejected))
    return result


def _undecided(one: Node, other: Node) -> str | None:
    """Why two replies that may be taken do not make a pair, or None."""
    if one.get("rank") is None or other.get("rank") is None:
        return "unranked"
    if one["rank"] == other["rank"]:
        return "same rank"
    return "same text" if one["text"] == other["text"] else None


def _record(tree: dict[str, Any], path: list[Node], chosen: Node, rejected: Node) -> dict[str, Any]:
    return {
        "prompt": [_message(node) for node in path],
        "chosen": [_message(chosen)],
        "rejected": [_message(rejected)],
        "tree_id": tree.get("message_tree_id") or path[0].get("message_tree_id") or path[0].get("message_id"),
        "message_ids": [node.get("message_id") for node in (*path, chosen, rejected)],
        "ranks": [chosen["rank"], rejected["rank"]],
        "lang": path[0].get("lang"),
    }


def _message(node: Node) -> dict[str, str]:
    return {"role": ROLES[node["role"]], "content": node["text"]}
