"""OASST extraction against paths worked out by hand, one tree (trees.py) with every case in it."""

from __future__ import annotations

import copy
import gzip
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.commands.data import extract_oasst
from lumina.config import UserError
from lumina.data import prepare
from lumina.data.oasst.extraction import OasstOptions, extract
from lumina.data.oasst.trees import trees_of
from tests.data.helpers import TOKENIZER, Settings, supervised_targets, write_jsonl
from tests.data.oasst.trees import node, the_tree


def paths(tree: dict[str, Any], **options: Any) -> tuple[list[str], dict[str, int]]:
    extraction = extract(tree, OasstOptions(**options))
    return [" ".join(record["message_ids"]) for record in extraction.records], dict(extraction.discarded)


def test_all() -> None:
    assert paths(the_tree()) == (
        ["P0 A1 P2 A3", "P0 A1 P2 A4", "P0 A10", "P0 A12"],
        {
            "unanswered sibling": 2,  # P5, P6: P2 is the first reply
            "deleted": 1,  # A9
            "synthetic": 1,  # A11
            "rejected prompt": 1,  # A15
            "roles do not alternate": 2,  # A17, P18
        },
    )


def test_best_takes_the_lowest_rank_at_each_step() -> None:
    taken, discarded = paths(the_tree(), threads="best")
    assert taken == ["P0 A1 P2 A4"]
    assert discarded["not the best"] == 5  # A3, P5, P6, A10, A12
    # A1 deleted: all its paths go, and the next best reply with an admissible path is A12 (A10 is unranked).
    tree = the_tree()
    tree["prompt"]["replies"][0]["deleted"] = True
    assert paths(tree, threads="best")[0] == ["P0 A12"]
    # All ranks away: the order of the replies decides, first A1, then P2 among its children, then A3.
    tree = the_tree()
    for reply in (tree["prompt"]["replies"][0], *tree["prompt"]["replies"][0]["replies"][0]["replies"]):
        reply["rank"] = None
    for reply in tree["prompt"]["replies"]:
        reply["rank"] = None
    assert paths(tree, threads="best")[0] == ["P0 A1 P2 A3"]


def test_best_loses_an_unanswered_prompter_too() -> None:
    tree = the_tree()
    del tree["prompt"]["replies"][0]["replies"][0]  # P2 with its answers
    assert paths(tree, threads="best")[0] == ["P0 A1"]


def test_prefixes_learn_only_the_last_reply() -> None:
    extraction = extract(the_tree(), OasstOptions(threads="prefixes"))
    taken = [" ".join(record["message_ids"]) for record in extraction.records]
    assert taken == ["P0 A1", "P0 A1 P2 A3", "P0 A1 P2 A4", "P0 A10", "P0 A12", "P0 A13", "P0 A16"]
    assert extraction.discarded == {
        "deleted": 2,  # A7, A9
        "synthetic": 1,  # A11
        "rejected prompt": 1,  # A15
        "roles do not alternate": 1,  # A17
    }
    (long,) = [record for record in extraction.records if record["message_ids"][-1] == "A3"]
    assert [message.get("weight") for message in long["messages"]] == [None, 0, None, None]


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"top_k": 1}, ["P0 A1 P2 A4"]),  # A10 is unranked with siblings, A12 has rank 3
        ({"top_k": 2}, ["P0 A1 P2 A3", "P0 A1 P2 A4"]),
        ({"top_k": 2, "include_deleted": True}, ["P0 A1 P2 A3", "P0 A1 P2 A4", "P0 A7 P8 A9"]),
        ({"top_k": 4}, ["P0 A1 P2 A3", "P0 A1 P2 A4", "P0 A12"]),
        ({"languages": frozenset({"en"})}, ["P0 A1 P2 A3", "P0 A1 P2 A4", "P0 A10"]),
        ({"languages": frozenset({"de"})}, []),  # the prompt is English
        ({"languages": frozenset({"en", "de"})}, ["P0 A1 P2 A3", "P0 A1 P2 A4", "P0 A10", "P0 A12"]),
        ({"include_deleted": True}, ["P0 A1 P2 A3", "P0 A1 P2 A4", "P0 A7 P8 A9", "P0 A10", "P0 A12"]),
        ({"include_synthetic": True}, ["P0 A1 P2 A3", "P0 A1 P2 A4", "P0 A10", "P0 A11", "P0 A12"]),
        ({"max_toxicity": 0.5}, ["P0 A1 P2 A3", "P0 A10", "P0 A12"]),
        ({"min_quality": 0.9}, ["P0 A10", "P0 A12"]),  # A1 has 0.8; a message without the label passes
        ({"tree_states": frozenset({"growing"})}, []),
    ],
)
def test_options_of_all(options: dict[str, Any], taken: list[str]) -> None:
    assert paths(the_tree(), **options)[0] == taken


def test_each_path_is_taken_or_counted_once() -> None:
    leaves = str(the_tree()).count("'replies': []")
    for options in ({}, {"top_k": 2}, {"threads": "best"}, {"min_quality": 0.5}, {"tree_states": frozenset({"x"})}):
        taken, discarded = paths(the_tree(), **options)
        assert len(taken) + sum(discarded.values()) == leaves


def test_only_the_first_reply_stands_for_the_shortened_path() -> None:
    """A1's replies in another order: an unanswered one comes first, of which whether it may pass decides."""
    tree = the_tree()
    replies = tree["prompt"]["replies"][0]["replies"]
    replies.insert(0, replies.pop(1))  # P5 before P2
    taken, discarded = paths(tree)
    assert taken == ["P0 A1", "P0 A1 P2 A3", "P0 A1 P2 A4", "P0 A10", "P0 A12"]
    assert discarded["unanswered sibling"] == 1  # P6
    replies[0]["deleted"] = True
    taken, discarded = paths(tree)
    assert taken == ["P0 A1 P2 A3", "P0 A1 P2 A4", "P0 A10", "P0 A12"]
    assert discarded["unanswered sibling"] == 1
    assert discarded["deleted"] == 2
    assert paths(tree, threads="best")[0] == ["P0 A1 P2 A4"]


def reference(root: dict[str, Any], top_k: int | None, languages: set[str]) -> list[str]:
    """The rule of Open-Assistant's training code in its terms, by recursion over one tree: no thread through a deleted
    message; a thread ends where nothing replies; one that ends with a prompter counts if that is the first reply to its
    parent, and loses it; top_k as the documents say."""

    def below(message: dict[str, Any], siblings: list[dict[str, Any]]) -> list[list[str]]:
        if message["deleted"] or (languages and message["lang"] not in languages):
            return []
        if message["role"] == "assistant" and top_k is not None:
            if message["rank"] is None and len(siblings) != 1:
                return []
            if message["rank"] is not None and message["rank"] >= top_k:
                return []
        if not message["replies"]:
            if message["role"] == "assistant":
                return [[message["message_id"]]]
            first = bool(siblings) and siblings[0]["message_id"] == message["message_id"]
            return [[]] if first else []
        return [
            [message["message_id"], *rest] for reply in message["replies"] for rest in below(reply, message["replies"])
        ]

    return [" ".join(thread) for thread in below(root, [])]


@st.composite
def drawn_trees(draw: st.DrawFn) -> dict[str, Any]:
    """Trees of alternating roles, up to six deep."""
    count = 0

    def message(depth: int) -> dict[str, Any]:
        nonlocal count
        count += 1
        name = f"{'A' if depth % 2 else 'P'}{count}"
        fields = {
            "deleted": draw(st.sampled_from([False] * 5 + [True])),
            "lang": draw(st.sampled_from(["en"] * 5 + ["de"])),
            "rank": draw(st.sampled_from([None, 0, 1, 2])) if depth % 2 else None,
        }
        replies = draw(st.integers(0, 3)) if depth < 5 else 0
        return node(name, [message(depth + 1) for _ in range(replies)], **fields)

    return message(0)


@settings(max_examples=300)
@given(drawn_trees(), st.sampled_from([None, 1, 2]), st.sampled_from([set(), {"en"}]), st.booleans())
def test_all_against_a_reference_over_drawn_trees(
    root: dict[str, Any], top_k: int | None, languages: set[str], flat: bool
) -> None:
    tree = {"message_tree_id": "T", "tree_state": "ready_for_export", "prompt": root}
    expected = reference(root, top_k, languages)
    if flat:
        rows = [{**row, "_number": number} for number, row in enumerate(flat_rows(tree))]
        (tree,), left = trees_of(rows)
        assert not left
    taken, discarded = paths(tree, top_k=top_k, languages=frozenset(languages))
    assert taken == expected
    leaves = str(root).count("'replies': []")
    assert len(taken) + sum(discarded.values()) == leaves


def test_a_prompt_without_replies_and_a_tree_without_state() -> None:
    assert paths({"message_tree_id": "T", "prompt": node("P0")}) == ([], {"no assistant reply": 1})
    assert paths({"message_tree_id": "T", "prompt": node("P0", [node("A1")])})[0] == ["P0 A1"]


def test_a_deep_tree_needs_no_recursion() -> None:
    root = tip = node("P0")
    for i in range(1, 3000):
        tip["replies"] = [node(("A" if i % 2 else "P") + str(i))]
        tip = tip["replies"][0]
    (record,) = extract({"prompt": root}, OasstOptions()).records
    assert len(record["messages"]) == 3000


def flat_rows(tree: dict[str, Any], hub_labels: bool = False) -> list[dict[str, Any]]:
    rows = []

    def walk(message: dict[str, Any], parent: str | None) -> None:
        row = {key: value for key, value in message.items() if key != "replies"}
        if hub_labels:
            row["labels"] = {
                "name": list(message["labels"]),
                "value": [label["value"] for label in message["labels"].values()],
                "count": [3 for _ in message["labels"]],
            }
        rows.append({**row, "parent_id": parent, "message_tree_id": "T", "tree_state": tree["tree_state"]})
        for reply in message["replies"]:
            walk(reply, message["message_id"])

    walk(tree["prompt"], None)
    return rows


def processed(source: Path, **options: Any) -> list[str]:
    out = source.with_name("out.jsonl")
    assert extract_oasst(str(source), str(out), **options) == 0
    return [" ".join(orjson.loads(line)["message_ids"]) for line in out.read_bytes().splitlines()]


@pytest.mark.parametrize("form", ["trees", "trees.gz", "flat", "flat children first", "parquet"])
def test_every_file_form_gives_the_same_conversations(tmp_path: Path, form: str) -> None:
    expected, _ = paths(the_tree(), max_toxicity=0.5)
    rows = flat_rows(the_tree(), hub_labels=form == "parquet")
    if form == "trees":
        source = write_jsonl(tmp_path / "in", [the_tree()])
    elif form == "trees.gz":
        source = tmp_path / "in"
        source.write_bytes(gzip.compress(orjson.dumps(the_tree()) + b"\n"))
    elif form == "flat":
        source = write_jsonl(tmp_path / "in", rows)
    elif form == "flat children first":
        # Parents after children; brothers keep their order, which decides ties.
        depth = {None: 0}
        for row in rows:
            depth[row["message_id"]] = depth[row["parent_id"]] + 1
        source = write_jsonl(tmp_path / "in", sorted(rows, key=lambda row: -depth[row["message_id"]]))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        source = tmp_path / "in"
        pq.write_table(pa.Table.from_pylist(rows), source)
    assert processed(source, max_toxicity=0.5) == expected


def test_orphans_and_duplicates_of_flat_messages_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = flat_rows(the_tree())
    orphan = {**rows[1], "message_id": "X", "parent_id": "nobody"}
    below = {**rows[2], "message_id": "Y", "parent_id": "X"}
    source = write_jsonl(tmp_path / "in", [*rows, orphan, below, rows[0], b"{"])
    assert extract_oasst(str(source), str(tmp_path / "out"), json=True) == 0
    summary = orjson.loads(capsys.readouterr().out)
    n = len(rows)
    assert summary["bad"] == {
        "broken JSON": {"count": 1, "first": [n + 4]},
        "parent missing": {"count": 2, "first": [n + 1, n + 2]},
        "duplicate message_id": {"count": 1, "first": [n + 3]},
    }
    assert summary["conversations"] == 4
    assert summary["discarded"]["deleted"] == 1


def test_provenance_and_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "in", [the_tree(), the_tree()])
    assert processed(source, max_conversations=3) == ["P0 A1 P2 A3", "P0 A1 P2 A4", "P0 A10"]
    assert "stopped at --max-conversations" in capsys.readouterr().out
    first = orjson.loads((tmp_path / "out.jsonl").read_bytes().splitlines()[0])
    assert first["tree_id"] == "T"
    assert first["ranks"] == [None, 0, None, 1]
    assert first["messages"][1] == {"role": "assistant", "content": "text of A1"}


def test_what_process_writes_trains_with_only_the_last_reply_of_a_prefix(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in", [the_tree()])
    processed(source, threads="prefixes")
    dataset = prepare([tmp_path / "out.jsonl"], Settings(), TOKENIZER)
    counts = supervised_targets(dataset)
    assert counts[TOKENIZER.stop_id] == 7  # one for each prefix
    assert dataset.account["messages_trained"] == 7


def test_trees_can_be_trained_on_directly_and_their_discards_are_in_the_account(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in", [the_tree()])
    direct = prepare([source], Settings(), TOKENIZER)
    flat = prepare([write_jsonl(tmp_path / "flat", flat_rows(the_tree()))], Settings(), TOKENIZER)
    processed(source)
    through = prepare([tmp_path / "out.jsonl"], Settings(), TOKENIZER)
    assert supervised_targets(direct) == supervised_targets(through) == supervised_targets(flat)
    assert direct.account["paths_discarded"] == paths(the_tree())[1]
    assert flat.account["lines"] == flat.account["records"] == len(flat_rows(the_tree()))


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([{"messages": []}], {}, "no OASST trees"),
        ([the_tree()], {"tree_state": "growing"}, "no path passes"),
        ([the_tree()], {"threads": "some"}, "none of all, best, prefixes"),
        ([the_tree()], {"threads": "best", "top_k": 1}, "goes with --threads all"),
        ([the_tree()], {"max_conversations": 0}, "at least 1"),
    ],
)
def test_what_cannot_work_is_said(tmp_path: Path, lines: list[Any], options: dict[str, Any], message: str) -> None:
    source = write_jsonl(tmp_path / "in", lines)
    with pytest.raises(UserError, match=message):
        extract_oasst(str(source), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_malformed_trees_are_bad_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = copy.deepcopy(the_tree())
    broken["prompt"]["replies"][3]["text"] = None
    source = write_jsonl(tmp_path / "in", [broken, the_tree(), {"prompt": {"replies": 7, "text": "", "role": ""}}])
    assert extract_oasst(str(source), str(tmp_path / "out"), json=True) == 0
    summary = orjson.loads(capsys.readouterr().out)
    assert summary["bad"] == {"not an OASST tree or message": {"count": 2, "first": [1, 3]}}


def test_content_beside_a_tree_is_not_lost_by_extracting_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "in", [the_tree() | {"system": "Be brief."}, the_tree()])
    assert extract_oasst(str(source), str(tmp_path / "out"), json=True) == 0
    summary = orjson.loads(capsys.readouterr().out)
    assert summary["bad"] == {"field not used: system": {"count": 1, "first": [1]}}
