"""An OASST tree with every case of the extraction in it.

P0 prompter
├─ A1 assistant, rank 0
│  ├─ P2 prompter
│  │  ├─ A3 assistant, rank 1
│  │  └─ A4 assistant, rank 0, toxicity 0.9
│  ├─ P5 prompter, unanswered
│  └─ P6 prompter, unanswered
├─ A7 assistant, rank 1, deleted
│  └─ P8 prompter
│     └─ A9 assistant, unranked, no sibling
├─ A10 assistant, unranked (with siblings)
├─ A11 assistant, rank 2, synthetic
├─ A12 assistant, rank 3, in German
├─ A13 assistant, rank 4
│  └─ P14 prompter, review_result false
│     └─ A15 assistant, unranked, no sibling
├─ A16 assistant, rank 5, quality 0.1
│  └─ A17 assistant (assistant after assistant)
└─ P18 prompter (prompter after prompter), unanswered
"""

from __future__ import annotations

from typing import Any


def node(name: str, replies: list[dict[str, Any]] | None = None, **fields: Any) -> dict[str, Any]:
    role = "prompter" if name[0] == "P" else "assistant"
    defaults = {"lang": "en", "deleted": False, "synthetic": False, "review_result": True, "rank": None, "labels": {}}
    text = f"text of {name}"
    return {"message_id": name, "role": role, "text": text, **defaults, **fields, "replies": replies or []}


def labels(**values: float) -> dict[str, Any]:
    return {name: {"value": value, "count": 3} for name, value in values.items()}


def the_tree() -> dict[str, Any]:
    prompt = node(
        "P0",
        [
            node(
                "A1",
                [
                    node("P2", [node("A3", rank=1), node("A4", rank=0, labels=labels(toxicity=0.9))]),
                    node("P5"),
                    node("P6", review_result=None),
                ],
                rank=0,
                labels=labels(quality=0.8, toxicity=0.1),
            ),
            node("A7", [node("P8", [node("A9")])], rank=1, deleted=True),
            node("A10"),
            node("A11", rank=2, synthetic=True),
            node("A12", rank=3, lang="de"),
            node("A13", [node("P14", [node("A15")], review_result=False)], rank=4),
            node("A16", [node("A17")], rank=5, labels=labels(quality=0.1)),
            node("P18"),
        ],
    )
    return {"message_tree_id": "T", "tree_state": "ready_for_export", "prompt": prompt}
