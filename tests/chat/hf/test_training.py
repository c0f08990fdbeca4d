"""Vocabularies that Lumina trains: transformers reads them, and makes the same ids of a conversation."""

import json
from pathlib import Path

import pytest

from lumina.chat import Conversation, Message, open_tokenizer, train_vocabulary
from lumina.config import UserError
from lumina.infer import stock_template

TEXTS = ["hello there, how are you today?", "the weather could be better", "a long train ride keeps me awake"] * 4
TALK = [("user", "hello there: ünï\n<|im_end|>?"), ("assistant", "the weather"), ("user", "how?"), ("assistant", "a")]


@pytest.mark.parametrize("name", ["chatml", "llama3", "zephyr"])
def test_transformers_makes_the_same_ids(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    template, special = stock_template(name)
    size = train_vocabulary(TEXTS, tmp_path / "own", 300, template, special)
    own, theirs = open_tokenizer(tmp_path / "own"), AutoTokenizer.from_pretrained(tmp_path / "own")
    assert size == own.vocab_size == len(theirs) == 300
    assert len(own.encode("hello there")) < len("hello there")
    plain = [(role, text.replace("<|im_end|>", "")) for role, text in TALK]
    rendered, refused = own.render_valid([Conversation([Message(role, text) for role, text in plain])])
    assert not refused
    messages = [{"role": role, "content": text} for role, text in plain]
    assert rendered.ids.tolist() == theirs.apply_chat_template(messages, return_dict=False)
    assert rendered.supervised.tolist() == [False, True, False, True]
    assert rendered.mask.sum() == len(own.encode("the weather")) + len(own.encode("a")) + 2
    typed = own.prompt_ids(Conversation([Message(*TALK[0])]))
    assert sum(own.is_special(token) for token in typed) == sum(
        own.is_special(token) for token in own.prompt_ids(Conversation([Message(*plain[0])]))
    )


def test_the_same_texts_give_the_same_file(tmp_path: Path) -> None:
    template, special = stock_template("chatml")
    for name in "ab":
        train_vocabulary(iter(TEXTS), tmp_path / name, 300, template, special)
    first, second = ((tmp_path / name / "tokenizer.json").read_text() for name in "ab")
    assert first == second
    assert len(json.loads(first)["model"]["merges"]) == 300 - 256 - 3


def test_too_few_ids_for_the_bytes(tmp_path: Path) -> None:
    template, special = stock_template("chatml")
    with pytest.raises(UserError, match="258 ids has no room for 256 bytes and 3 special tokens"):
        train_vocabulary(TEXTS, tmp_path / "own", 258, template, special)
    assert train_vocabulary(TEXTS, tmp_path / "own", 259, template, special) == 259
    assert open_tokenizer(tmp_path / "own").decode(open_tokenizer(tmp_path / "own").encode("naïve")) == "naïve"
