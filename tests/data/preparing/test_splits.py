"""Hold-out and duplicates: every conversation in exactly one place, groups whole, the same every time."""

from __future__ import annotations

import random
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.chat import Conversation, Message, ToolCall
from lumina.config import UserError
from lumina.data import PackedDataset
from lumina.data.account import Account
from lumina.data.preparing.deduplication import (
    DUPLICATE,
    EVAL,
    TRAIN,
    conversation_hash,
    decide,
    near_pairs,
    signatures_of,
)
from lumina.data.preparing.splits import prepare_splits
from tests.data.helpers import TOKENIZER, Settings, Source, chat, expected_targets, supervised_targets, write_jsonl
from tests.data.languages import LANGUAGES


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
        if len(set(sides)) < 2:  # one group
            with pytest.raises(UserError, match=r"eval_fraction 0.4 cannot be held out: \d+ of"):
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
    return decide(signatures, split, how.get("eval_fraction", 0.0), how.get("dedup", "none")).split.tolist()


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
        sides = decide(signatures, np.zeros(2, dtype=np.uint8), 0.5, "near").split.tolist()
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


@pytest.mark.parametrize("language", [*LANGUAGES, "mixed"])
def test_no_prompt_is_on_both_sides_in_languages_without_spaces(tmp_path: Path, language: str) -> None:
    """300 prompts with four answers each."""
    rng = random.Random(language)
    words = " ".join(LANGUAGES.values()) + " Python GPU train" if language == "mixed" else LANGUAGES[language]
    said = lambda count: "".join(rng.choice(words.split()) for _ in range(count))
    prompts = [f"{said(rng.randint(6, 14))}。{said(5)}？" for _ in range(300)]
    assert len(set(prompts)) == 300
    lines = [chat(prompt, said(20)) for prompt in prompts for _ in range(4)]
    rng.shuffle(lines)
    path = str(write_jsonl(tmp_path / "in.jsonl", lines))
    train, held_out = prepare_splits(Settings(train_data=(path,), eval_fraction=0.15, seq_length=512), TOKENIZER)
    assert held_out is not None
    sides = [
        {lines[chunk.line - 1]["messages"][0]["content"] for s in range(d.num_samples) for chunk in d.chunks_of(s)}
        for d in (train, held_out)
    ]
    assert len(sides[1]) > 20
    assert not sides[0] & sides[1]
    assert len(sides[0]) + len(sides[1]) == 300


@pytest.mark.parametrize("language", LANGUAGES)
def test_long_texts_that_differ_in_a_word_are_near_duplicates_in_every_language(language: str) -> None:
    rng = random.Random(language)
    words = LANGUAGES[language].split()
    text = [rng.choice(words) for _ in range(150)]
    other = [rng.choice(words) for _ in range(150)]
    changed = [*text[:70], "Python" if text[70] != "Python" else "GPU", *text[71:]]
    texts = ["".join(text), "".join(changed), "".join(other)]
    found = decided([dialogue("a", answer) for answer in texts], dedup="near")
    assert found == [TRAIN, DUPLICATE, TRAIN]
    assert decided([dialogue("a", answer) for answer in texts], dedup="exact") == [TRAIN] * 3


def test_one_long_setting_does_not_make_duplicates_of_different_conversations() -> None:
    """What is compared are the turns and, by itself, what conversations are set up with."""
    system = Message("system", LONG * 5)
    tools = ('{"type": "function", "function": {"name": "look", "description": "' + LONG * 5 + '"}}',)
    turns = [
        [Message("user", f"where is {name} now"), Message("assistant", f"in the {name} street")] for name in "abcdefgh"
    ]
    for messages, offered in (([system], ()), ([], tools), ([system], tools)):
        conversations = [Conversation([*messages, *own], tools=offered) for own in turns]
        assert decided(conversations, dedup="near") == [TRAIN] * len(turns)
        again = [*conversations, Conversation([*messages, *turns[0]], tools=offered)]
        assert decided(again, dedup="near") == [*[TRAIN] * len(turns), DUPLICATE]
    answer = Message("assistant", LONG)
    setups = [LONG * 2, LONG * 2 + "today", LONG[::-1] * 2, ""]
    conversations = [Conversation([Message("system", text), answer]) for text in setups]
    assert decided(conversations, dedup="near") == [TRAIN, DUPLICATE, TRAIN, TRAIN]


def test_texts_without_words_are_not_alike() -> None:
    texts = ["😀", "👍👍", "—", "…", "?!"]
    assert decided([dialogue(text, text) for text in texts], dedup="near") == [TRAIN] * len(texts)
    assert decided([dialogue(text, text) for text in [*texts, texts[0]]], dedup="near")[-1] == DUPLICATE


def test_what_makes_a_conversation_another_one() -> None:
    call = ToolCall("weather", '{"city": "Oslo"}', "call_1")
    plain = Message("assistant", "it is cold")
    different = [
        plain,
        plain._replace(reasoning="so far north"),
        plain._replace(content="so far north", reasoning="it is cold"),
        plain._replace(content="so far north\nit is cold"),
        plain._replace(tool_calls=(call,)),
        plain._replace(tool_calls=(call._replace(name="climate"),)),
        plain._replace(tool_calls=(call._replace(arguments='{"city": "Rome"}'),)),
        plain._replace(tool_calls=(call, call)),
        plain._replace(content="", tool_calls=(call,)),
        plain._replace(supervise=False),
        plain._replace(masked=((0, 3),)),
    ]
    conversations = [Conversation([Message("user", "hm"), message]) for message in different]
    conversations += [Conversation([Message("user", "hm"), plain], tools=tools) for tools in (("{}",), ("{}", "{}"))]
    assert decided(conversations, dedup="exact") == [TRAIN] * len(conversations)
    hashes = {conversation_hash(conversation) for conversation in conversations}
    assert len(hashes) == len(conversations)
    # Ids say nothing: of conversations, of calls.
    other = plain._replace(tool_calls=(call._replace(id="call_2"),))
    same = [Conversation([Message("user", "hm"), m], id=i) for m, i in ((different[4], "1"), (other, "2"))]
    assert decided(same, dedup="exact") == [TRAIN, DUPLICATE]
    assert len({conversation_hash(conversation) for conversation in same}) == 1


@pytest.mark.parametrize(
    ("ids", "asked", "held", "message"),
    [
        (["x"] * 200, 0.1, None, r"0.1 cannot be held out: 200 of 200 .*one side because they have one `id`.*'x'"),
        ([7] * 200, 0.5, None, r"'7'"),
        (["a", "b"] * 100, 0.1, None, r"(?s)100 of 200 conv.*ask for 0.5, the nearest"),
        (["a", "b"] * 100, 0.4, 100, r"100 of 200 conversations held out, 50% where 40% was asked"),
        (["a", "b", "c"] * 67, 0.01, None, r"(?s)67 of 201 conv.*ask for 0.33"),
        (["unknown"] * 190 + [f"n{i}" for i in range(10)], 0.1, 10, r"10 of 200 conversations held out, 5% where 10%"),
        (["train"] * 150 + ["validation"] * 50, 0.2, 50, None),
        ([""] * 200, 0.1, None, ""),
        (["  "] * 200, 0.1, None, ""),
        ([None] * 200, 0.1, None, ""),
        (list(range(200)), 0.1, None, ""),
    ],
)  # fmt: skip
def test_ids_of_large_groups_are_told_before_they_cost_a_run(
    tmp_path: Path, ids: list[Any], asked: float, held: int | None, message: str | None
) -> None:
    """Refused where no choice comes near the share, told where one does; ids that name nothing group nothing."""
    path = str(write_jsonl(tmp_path / "in.jsonl", [{"id": v, **chat(f"q {i}", f"a {i}")} for i, v in enumerate(ids)]))
    config = Settings(train_data=(path,), eval_fraction=asked)
    if message and held is None:
        with pytest.raises(UserError, match=message) as refused:
            prepare_splits(config, TOKENIZER)
        assert "eval_data" in str(refused.value)
        assert "jq -c 'del(.id)'" in str(refused.value)
        weighted = Settings(data=(Source(path, 0.5),), eval_fraction=asked)
        with pytest.raises(UserError, match=message):
            prepare_splits(weighted, TOKENIZER)
        return
    for _ in range(2):  # from the cache too
        train, held_out = prepare_splits(config, TOKENIZER)
        assert held_out is not None
        count = train.account["conversations_dropped"]["held out for evaluation"]
        if held is None:
            assert 0.5 * asked <= count / len(ids) <= 2 * asked
        else:
            assert count == held
        notes = [line for line in train.account_lines() if "note:" in line]
        if message:
            assert len(notes) == 1
            assert re.search(message, notes[0])
        elif message == "":
            assert not notes


def test_one_first_prompt_of_many_conversations_is_told_too(tmp_path: Path) -> None:
    prompt = "Translate the following text into German please"
    path = str(write_jsonl(tmp_path / "in.jsonl", [chat(prompt, "ok", f"t {i}", f"a {i}") for i in range(50)]))
    with pytest.raises(UserError, match=r"(?s)50 of 50 .* begin with one prompt: 'Translate the.*system mess"):
        prepare_splits(Settings(train_data=(path,), eval_fraction=0.1), TOKENIZER)


def test_a_group_of_duplicates_counts_as_the_one_that_stays(tmp_path: Path) -> None:
    lines = [*[chat("the same question again", "yes")] * 300, *(chat(f"q {i}", f"a {i}") for i in range(100))]
    path = str(write_jsonl(tmp_path / "in.jsonl", lines))
    train, held_out = prepare_splits(Settings(train_data=(path,), eval_fraction=0.2, dedup="exact"), TOKENIZER)
    assert held_out is not None
    assert 10 <= held_out.account["messages_trained"] <= 40
    assert train.account["messages_trained"] + held_out.account["messages_trained"] == 101


def test_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_jsonl(tmp_path / "in.jsonl", [chat("a", "one")]))
    with pytest.raises(UserError, match="both eval_data and eval_fraction"):
        prepare_splits(Settings(train_data=(path,), eval_data=(path,), eval_fraction=0.1), TOKENIZER)
    with pytest.raises(UserError, match=r"cannot be held out: there are only 1 conversation\(s\)"):
        prepare_splits(Settings(train_data=(path,), eval_fraction=1e-9), TOKENIZER)
    monkeypatch.setattr("lumina.data.preparing.splits.near_available", lambda: False)
    with pytest.raises(UserError, match="rensa"):
        prepare_splits(Settings(train_data=(path,), dedup="near"), TOKENIZER)
