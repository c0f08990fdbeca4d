"""Hold-out and duplicates: every conversation in exactly one place, groups whole, the same every time."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.chat import Conversation, Message
from lumina.config import UserError
from lumina.data import PackedDataset
from lumina.data.account import Account
from lumina.data.preparing.deduplication import DUPLICATE, EVAL, TRAIN, decide, near_pairs, signatures_of
from lumina.data.preparing.splits import prepare_splits
from tests.data.helpers import TOKENIZER, Settings, chat, expected_targets, supervised_targets, write_jsonl


def supervised(*datasets: PackedDataset | None) -> Counter[int]:
    return sum((supervised_targets(dataset) for dataset in datasets if dataset), Counter())


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=12, max_size=40), st.booleans())
def test_every_answer_is_supervised_or_held_out_once(drawn: list[tuple[int, int]], packing: bool) -> None:
    lines = [
        {"id": f"id {group}", **chat(f"question {i}", f"answer {answer}")} for i, (group, answer) in enumerate(drawn)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_jsonl(Path(folder) / "in.jsonl", lines))
        config = Settings(train_data=(path,), eval_fraction=0.4, packing=packing)
        sides = decided(
            [dialogue(f"question {i}", f"answer {answer}", f"id {group}") for i, (group, answer) in enumerate(drawn)],
            eval_fraction=0.4,
        )
        if len(set(sides)) < 2:  # all on one side, as few groups may be
            with pytest.raises(UserError, match="nothing is left to train on"):
                prepare_splits(config, TOKENIZER)
            return
        train, held_out = prepare_splits(config, TOKENIZER)
        assert held_out is not None
        assert supervised(train, held_out) == expected_targets(lines)
        for dataset in (train, held_out):
            Account.from_dict(dataset.account).check()
            assert dataset.account["messages"] == 2 * len(lines)
        ids = [
            {lines[chunk.line - 1]["id"] for s in range(d.num_samples) for chunk in d.chunks_of(s)}
            for d in (train, held_out)
        ]
        assert not ids[0] & ids[1], "an id is on both sides"


def decided(conversations: list[Conversation], given: list[int] | None = None, **how: Any) -> list[int]:
    signatures = signatures_of(conversations, near=how.get("dedup") == "near")
    split = np.array(given or [TRAIN] * len(conversations), dtype=np.uint8)
    return decide(signatures, split, how.get("eval_fraction", 0.0), how.get("dedup", "none")).tolist()


def dialogue(prompt: str, answer: str, conversation_id: str = "") -> Conversation:
    return Conversation([Message("user", prompt), Message("assistant", answer)], conversation_id)


def test_one_prompt_stays_on_one_side_and_the_share_is_about_right() -> None:
    rng = random.Random(0)
    conversations = [
        dialogue(f"please tell me something about topic {i // 4}", f"answer {rng.random()}") for i in range(4000)
    ]
    sides = np.array(decided(conversations, eval_fraction=0.1)).reshape(1000, 4)
    assert (sides == sides[:, :1]).all()
    # 1000 groups at 0.1: a standard deviation of 0.0095; five of them.
    assert abs((sides[:, 0] == EVAL).mean() - 0.1) < 0.048
    assert abs(np.mean(decided([dialogue("hi", str(i)) for i in range(1000)], eval_fraction=0.1)) - 0.1) < 0.048


def test_a_side_does_not_depend_on_the_rest_of_the_data() -> None:
    conversations = [dialogue(f"please tell me something about topic {i}", "yes") for i in range(200)]
    assert decided(conversations[:120], eval_fraction=0.3) == decided(conversations, eval_fraction=0.3)[:120]


LONG = "the quick brown fox jumps over the lazy dog and runs through the deep dark forest until the morning comes " * 3


def test_near_duplicates_of_a_prompt_stay_on_one_side() -> None:
    for i in range(40):
        pair = [
            dialogue(f"{LONG} number {i}", "one answer"),
            dialogue(f"{LONG} number {i}!!  Thanks", "quite another"),
        ]
        signatures = signatures_of(pair, near=True)
        sides = decide(signatures, np.zeros(2, dtype=np.uint8), 0.5, "near").tolist()
        assert sides[0] == sides[1] or DUPLICATE in sides


def test_duplicates_go_and_the_evaluation_keeps_its_own() -> None:
    conversations = [
        dialogue("a", "b"),
        dialogue("c", "d"),
        dialogue("a", "b"),
        dialogue("c", "d"),
        dialogue("e", "f"),
    ]
    given = [TRAIN, TRAIN, TRAIN, EVAL, EVAL]
    assert decided(conversations, given, dedup="exact") == [TRAIN, DUPLICATE, DUPLICATE, EVAL, EVAL]
    almost = dialogue("a", LONG + " one more word")
    assert decided([dialogue("a", LONG), almost], dedup="exact") == [TRAIN, TRAIN]
    assert decided([dialogue("a", LONG), almost], dedup="near") == [TRAIN, DUPLICATE]
    assert decided([dialogue("a", LONG), dialogue("a", LONG[::-1])], dedup="near") == [TRAIN, TRAIN]


def test_near_pairs_against_true_jaccard_similarity() -> None:
    """Texts of known overlap: nearly all pairs above 0.9 are found, none below 0.5."""
    rng = random.Random(1)
    base = [f"w{i}" for i in range(200)]
    texts = []
    for _ in range(120):
        words = base.copy()
        for _ in range(rng.choice([0, 1, 2, 10, 40])):
            words[rng.randrange(200)] = f"x{rng.random()}"
        texts.append(words)
    shingles = [{tuple(words[i : i + 5]) for i in range(196)} for words in texts]
    true = lambda a, b: len(shingles[a] & shingles[b]) / len(shingles[a] | shingles[b])
    signatures = signatures_of([dialogue("q", " ".join(words)) for words in texts], near=True)
    found = near_pairs(signatures.text_minhash)
    assert all(true(a, b) > 0.5 for a, b in found)
    joined = {b for _, b in found}
    later_twins = {b for b in range(120) if any(true(a, b) > 0.9 for a in range(b))}
    assert len(later_twins - joined) <= 0.05 * len(later_twins)


def test_files_with_duplicates_across_train_and_eval(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "t.jsonl", [chat("a", "one"), chat("b", "two"), b"bad", chat("a", "one")])
    evaluation = write_jsonl(tmp_path / "e.jsonl", [chat("b", "two"), chat("c", "three")])
    config = Settings(train_data=(str(train),), eval_data=(str(evaluation),), dedup="exact")
    datasets = prepare_splits(config, TOKENIZER)
    assert datasets[1] is not None
    assert supervised_targets(datasets[0]) == expected_targets([chat("a", "one")])
    assert supervised_targets(datasets[1]) == expected_targets([chat("b", "two"), chat("c", "three")])
    assert datasets[0].account["conversations_dropped"] == {"duplicate": 2}
    assert datasets[0].account["messages_dropped"] == {"duplicate": 4}
    again = prepare_splits(config, TOKENIZER)
    assert again[0].fingerprint == datasets[0].fingerprint
    plain = prepare_splits(Settings(train_data=(str(train),)), TOKENIZER)
    assert plain[1] is None
    assert plain[0].fingerprint != datasets[0].fingerprint


def test_decisions_line_up_across_tasks_trees_and_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumina.data.preparing.preparation.MIN_TASK_BYTES", 700)
    monkeypatch.setattr("lumina.data.preparing.preparation.MAX_TASK_BYTES", 700)
    monkeypatch.setattr("lumina.data.preparing.pool.BYTES_PER_WORKER", 1)
    reply = lambda name: {"message_id": name, "role": "assistant", "text": f"reply {name}", "replies": []}
    trees = [
        {
            "message_tree_id": f"tree {i}",
            "tree_state": "ready_for_export",
            "prompt": {"message_id": "p", "role": "prompter", "text": "q", "replies": [reply(f"{i}a"), reply(f"{i}b")]},
        }
        for i in range(30)
    ]
    lines = [line for i in range(30) for line in (trees[i], chat(f"question {i}", f"answer {i}"), b"bad", b"")]
    path = str(write_jsonl(tmp_path / "in.jsonl", lines))
    splits = {}
    for workers in (1, 2):
        config = Settings(
            train_data=(path,), eval_fraction=0.3, cache_dir=str(tmp_path / str(workers)), num_workers=workers
        )
        splits[workers] = prepare_splits(config, TOKENIZER)
    train, held_out = splits[1]
    assert [d.fingerprint for d in splits[1] if d] == [d.fingerprint for d in splits[2] if d]
    answers = [chat("q", f"reply {i}{side}") for i in range(30) for side in "ab"]
    answers += [chat("q", f"answer {i}") for i in range(30)]
    assert supervised(train, held_out) == supervised(*splits[2]) == expected_targets(answers)
    text = lambda d: " ".join(TOKENIZER.decode(p.ids) for s in range(d.num_samples) for p in d.chunks_of(s))
    for i in range(30):
        assert (f"reply {i}a<" in text(train)) == (f"reply {i}b<" in text(train)), "a tree is on both sides"


def test_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_jsonl(tmp_path / "in.jsonl", [chat("a", "one")]))
    with pytest.raises(UserError, match="both eval_data and eval_fraction"):
        prepare_splits(Settings(train_data=(path,), eval_data=(path,), eval_fraction=0.1), TOKENIZER)
    with pytest.raises(UserError, match="nothing is left to train on of the 1 conv"):
        prepare_splits(Settings(train_data=(path,), eval_fraction=1e-9), TOKENIZER)
    monkeypatch.setattr("lumina.data.preparing.splits.near_available", lambda: False)
    with pytest.raises(UserError, match="rensa"):
        prepare_splits(Settings(train_data=(path,), dedup="near"), TOKENIZER)
