"""The quickstart's conversations: what of the two corpora is taken, held to the packages' own files."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.data import chitchat, everyday

WORDS = st.lists(st.text("abc'", min_size=1, max_size=4), min_size=1, max_size=8)


def test_a_list_is_a_dialogue_or_a_question_with_answers() -> None:
    lists = [["Hi ", "Hello\n there", "Bye"], ["alone"], ["x", "  "]]
    answers = [["Hi", "Hello there"], ["Hi", "Bye"]]
    found = [[message["content"] for message in messages] for messages in everyday.exchanges_of("ai", lists)]
    assert found == answers
    (dialogue,) = everyday.exchanges_of("conversations", lists)
    assert dialogue == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello there"},
        {"role": "user", "content": "Bye"},
    ]


def test_files_hold_the_corpora_s_words_and_no_others(tmp_path: Path) -> None:
    corpus = pytest.importorskip("chatterbot_corpus", reason="the extra quickstart is not installed")
    pytest.importorskip("chitchat_dataset", reason="the extra quickstart is not installed")
    counts = everyday.write_files(tmp_path)
    held = {path.name: [json.loads(line)["messages"] for line in path.open()] for path in counts}
    assert {path.name: count for path, count in counts.items()} == {name: len(lines) for name, lines in held.items()}
    folder = Path(corpus.__file__).parent / "data" / "english"
    source = " ".join(
        " ".join(path.read_text(encoding="utf-8").replace("''", "'").split()) for path in folder.iterdir()
    )
    texts = [message["content"] for messages in held["exchanges.jsonl"] for message in messages]
    # Double-quoted YAML strings escape their quotes; every other text stands in the source as it is.
    foreign = {text for text in texts if text not in source and text.replace('"', '\\"') not in source}
    assert not foreign
    assert len({json.dumps(messages) for messages in held["exchanges.jsonl"]}) == len(held["exchanges.jsonl"])

    whole = dict(chitchat.read_dialogues())
    openings = held["openings.train.jsonl"] + held["openings.eval.jsonl"]
    assert sorted(map(json.dumps, openings)) == sorted(json.dumps(messages[:4]) for messages in whole.values())
    held_out = [messages[:4] for key, messages in whole.items() if chitchat.held_out(key)]
    assert held["openings.eval.jsonl"] == held_out

    # The answers of the varied exchanges are the exchanges' own, each as often.
    answers = [[message for message in messages if message["role"] == "assistant"] for messages in held["varied.jsonl"]]
    assert answers == [
        [message for message in messages if message["role"] == "assistant"]
        for messages in held["exchanges.jsonl"]
        for _ in range(everyday.VARIANTS)
    ]
    assert len({json.dumps(messages) for messages in held["varied.jsonl"]}) > len(held["varied.jsonl"]) // 2
    assert everyday.write_files(tmp_path / "again") == {tmp_path / "again" / path.name: n for path, n in counts.items()}
    assert (tmp_path / "again/varied.jsonl").read_bytes() == (tmp_path / "varied.jsonl").read_bytes()


@given(text=WORDS.map(" ".join), pieces=st.lists(WORDS, min_size=1, max_size=3), seed=st.integers(0, 10**6))
def test_a_variant_has_something_of_the_text_and_nothing_from_elsewhere(
    text: str, pieces: list[list[str]], seed: int
) -> None:
    own = set(text.lower().split())
    found = everyday.varied(text, random.Random(seed), [[word.upper() for word in piece] for piece in pieces])
    said = {word.rstrip("?.!") for word in found.lower().split()}
    assert said & own
    assert said <= own | {word for piece in pieces for word in piece}
