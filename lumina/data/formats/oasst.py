"""OASST message trees as training data: every thread that the default options take (`lumina process-oasst` has
more)."""

from __future__ import annotations

from typing import Any

from lumina.chat import Conversation
from lumina.data.formats._format import DataFormat
from lumina.data.formats.messages import from_messages
from lumina.data.oasst.extraction import OasstOptions, extract
from lumina.data.oasst.trees import malformed
from lumina.data.records.fault import EMPTY, WRONG_TYPE, Fault, Tree
from lumina.data.records.fields import FieldTally, Vocabulary

RECORD = Vocabulary("an OASST tree", frozenset({"prompt", "message_tree_id", "tree_state", "origin"}))
# What selects messages is used too; the rest of what an export says of a message is about people and the platform.
MESSAGE = Vocabulary(
    "an OASST message",
    frozenset({"text", "role", "replies", "rank", "deleted", "synthetic", "review_result", "lang", "labels"}),
)


def count_fields(tree: dict[str, Any], tally: FieldTally) -> Fault | None:
    """Counts the fields of a well-formed tree and of its messages, or says why they do not allow its use."""
    fault = tally.count(RECORD, tree)
    stack = [tree["prompt"]]
    while stack and fault is None:
        node = stack.pop()
        fault = tally.count(MESSAGE, node)
        stack.extend(node.get("replies") or [])
    return fault


def from_tree(record: dict[str, Any], tally: FieldTally) -> Tree | Fault:
    reason = malformed(record)
    if reason is not None:
        return Fault(WRONG_TYPE, f"an OASST tree with {reason}")
    fault = count_fields(record, tally)
    if fault is not None:
        return fault
    extraction = extract(record, OasstOptions())
    conversations: list[Conversation] = []
    own = FieldTally()  # the fields of these records are extraction's own
    for thread in extraction.records:
        found = from_messages(thread, own)
        if isinstance(found, Fault) or own.left_out:
            extraction.discarded[found.reason if isinstance(found, Fault) and not own.left_out else EMPTY] += 1
        else:
            conversations.append(found)
        own.end_record(used=False)
    return Tree(conversations, extraction.discarded)


def _has_tree(record: dict[str, Any]) -> bool:
    return type(record.get("prompt")) is dict


FORMAT = DataFormat("OASST tree", from_tree, recognise=((20, _has_tree),), required=_has_tree)
