"""Preference pairs of OASST trees against pairs worked out by hand; the tree is drawn in test_oasst.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from lumina.cli import main
from lumina.data.oasst.extraction import OasstOptions
from lumina.data.oasst.pairs import extract_pairs
from tests.data.helpers import write_jsonl
from tests.data.oasst.trees import labels, node, the_tree


def pairs(tree: dict[str, Any], **options: Any) -> tuple[list[str], dict[str, int]]:
    found = extract_pairs(tree, OasstOptions(**options))
    return [" ".join(record["message_ids"]) for record in found.records], dict(found.discarded)


def test_every_pair_of_ranked_replies() -> None:
    """Under P0: A1, A7 (deleted), A10 (unranked), A11 (synthetic), A12, A13, A16: 21 pairs; under P2: A3 and A4."""
    found, discarded = pairs(the_tree())
    assert found == [
        *("P0 A1 A12", "P0 A1 A13", "P0 A1 A16", "P0 A12 A13", "P0 A12 A16", "P0 A13 A16"),
        "P0 A1 P2 A4 A3",  # A4 is ranked higher
    ]
    # 6 with A7, 5 more with A11, 4 more with A10.
    assert discarded == {"deleted": 6, "synthetic": 5, "unranked": 4}
    assert len(found) + sum(discarded.values()) == 21 + 1


def test_options_leave_pairs_out() -> None:
    assert pairs(the_tree(), languages=frozenset({"en"}))[0][:3] == ["P0 A1 A13", "P0 A1 A16", "P0 A13 A16"]
    assert pairs(the_tree(), max_toxicity=0.5)[1]["toxic"] == 1
    assert pairs(the_tree(), min_quality=0.5)[1]["low quality"] == 3 + 1  # those with A16; by order, A10's before
    found, discarded = pairs(the_tree() | {"tree_state": "growing"})
    assert (found, discarded) == ([], {"tree state": 22})


def test_undecided() -> None:
    replies = [node("A1", rank=0), node("A2", rank=0), node("A3", rank=1), node("A4", rank=2)]
    replies[3]["text"] = replies[2]["text"]
    tree = {"prompt": node("P0", replies)}
    found, discarded = pairs(tree)
    assert found == ["P0 A1 A3", "P0 A1 A4", "P0 A2 A3", "P0 A2 A4"]
    assert discarded == {"same rank": 1, "same text": 1}


def test_records_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {"message_tree_id": "T", "prompt": node("P0", [node("A2", rank=1), node("A1", rank=0, labels=labels())])}
    source = write_jsonl(tmp_path / "trees.jsonl", [tree, the_tree()])
    out = tmp_path / "pairs.jsonl"
    assert main(["process-oasst", str(source), str(out), "--pairs"]) == 0
    said = capsys.readouterr().out
    assert "8 preference pairs" in said
    assert "discarded pairs of replies: deleted: 6" in said
    first = orjson.loads(out.read_bytes().splitlines()[0])
    assert first == {
        "prompt": [{"role": "user", "content": "text of P0"}],
        "chosen": [{"role": "assistant", "content": "text of A1"}],
        "rejected": [{"role": "assistant", "content": "text of A2"}],
        "tree_id": "T",
        "message_ids": ["P0", "A1", "A2"],
        "ranks": [0, 1],
        "lang": "en",
    }
    assert main(["process-oasst", str(source), str(tmp_path / "no"), "--pairs", "--top-k", "1"]) == 2
    assert "--pairs" in capsys.readouterr().err
