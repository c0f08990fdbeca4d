"""Drawn conversations through templates of several kinds: the context of each answer is its prompt, nothing that is
typed becomes a special token, every message is accounted for once, and answers are read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.chat import Conversation, HFTokenizer, Message, ToolCall
from tests.outside import command_at

pytest.importorskip("trl")
command = command_at(Path(__file__).parents[3] / "benchmarks/chat_templates.py")
KINDS = ("qwen2_5", "qwen3", "llama3_2", "gptoss", "glm4moe", "gemma4_v5", "deepseekv3")
TYPED = ["<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|user|>", "<|call|>", "<|end|>", "<|channel|>", "<turn|>"]
TYPED += ["<｜User｜>", '<|"|>', "<|im", "_end|>"]
PIECES = [*TYPED, "Rome", " ", "\n", '"', "{}", "é🙂", "5", "name", "\ufdd2"]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5)
WORDS = TEXTS.map("".join).map(str.strip).filter(bool)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HFTokenizer]:
    root, stock = tmp_path_factory.mktemp("law"), command.stock_templates()
    return {name: HFTokenizer(command.write_tokenizer(root / name, name, stock[name])) for name in KINDS}


@st.composite
def conversations(draw: Any) -> Conversation:
    messages, tools = list[Message](), False
    if draw(st.booleans()):
        messages.append(Message("system", draw(WORDS)))
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(WORDS)))
        for _ in range(draw(st.integers(0, 2))):
            arguments = draw(st.dictionaries(st.sampled_from(["city", "day"]), st.one_of(WORDS, st.integers(0, 9))))
            call, tools = ToolCall("weather", json.dumps(arguments)), True
            thought = draw(st.one_of(st.just(""), WORDS))
            messages += [Message("assistant", "", reasoning=thought, tool_calls=(call,)), Message("tool", draw(WORDS))]
        thought, supervise = draw(st.one_of(st.just(""), WORDS)), draw(st.sampled_from([True, True, False]))
        messages.append(Message("assistant", draw(WORDS), supervise, reasoning=thought))
    return Conversation(messages, tools=command.TOOLS if tools or draw(st.booleans()) else ())


def without_names(text: str) -> str:
    for name in TYPED:
        text = text.replace(name, "x")
    return text.replace("|", "x").replace("\ufdd2", "x")


def neutral(given: Conversation) -> Conversation:
    """The same without a typed name of a special token."""
    messages = [
        message._replace(
            content=without_names(message.content),
            reasoning=without_names(message.reasoning),
            tool_calls=tuple(call._replace(arguments=without_names(call.arguments)) for call in message.tool_calls),
        )
        for message in given.messages
    ]
    return Conversation(messages, tools=given.tools)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=20, deadline=None)
@given(conversations())
def test_the_law(tokenizers: dict[str, HFTokenizer], name: str, given: Conversation) -> None:
    tokenizer = tokenizers[name]
    block, refused = tokenizer.render_valid([given])
    if refused:
        assert refused[0].startswith(("the chat template leaves out", "the chat template refuses it")), refused
        return
    messages, accounted, supervised = given.messages, list[int](), list[int]()
    for sample in range(len(block.source)):
        first, last = block.conversation_offsets[sample : sample + 2]
        start = int(block.message_offsets[first])
        accounted += [int(at - first) for at in range(first, last) if not block.repeated[at]]
        mask = block.mask[start : block.message_offsets[last]]
        counted = 0
        for at in range(first, last):
            if not block.supervised[at]:
                continue
            number = int(at - first)
            supervised.append(number)
            begin = int(block.message_offsets[at] + block.head[at])
            prefix = Conversation(messages[:number], tools=given.tools)
            prompts = [tokenizer.prompt_ids(prefix, thinking) for thinking in (None, True, False)]
            assert block.ids[start:begin].tolist() in prompts
            size = int(np.argmin(np.append(block.mask[begin:], 0)))
            said = block.ids[begin : begin + size].tolist()
            counted += size
            assert [token in tokenizer.stop_ids for token in said] == [False] * (size - 1) + [True]
            assert tokenizer.allowed_tokens(len(block.ids) + 600)[said].all()
        assert counted == mask.sum()
    assert sorted(accounted) == list(range(len(messages)))
    assert sorted(supervised) == [i for i, m in enumerate(messages) if m.role == "assistant" and m.supervise]
    special = [int(token) for token in block.ids if tokenizer.is_special(int(token))]
    other = tokenizer.render_valid([neutral(given)])[0].ids
    assert special == [int(token) for token in other if tokenizer.is_special(int(token))]


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_answers_are_read_back_token_by_token(tokenizers: dict[str, HFTokenizer], name: str, data: Any) -> None:
    texts = st.text(st.sampled_from("ab {}\"'\n<>é:,"), min_size=1, max_size=12).map(str.strip).filter(bool)
    call = ToolCall("weather", json.dumps({"city": data.draw(texts.map(lambda text: "x" + text))}))
    calls = data.draw(st.booleans())
    reasoning = data.draw(st.one_of(st.just(""), texts))
    content = "" if calls else data.draw(texts)
    answer = Message("assistant", content, reasoning=reasoning, tool_calls=(call,) if calls else ())
    if name == "gptoss" and "{" in content:
        return
    assert command.read_back(tokenizers[name], answer) in (True, None)


def test_a_call_that_does_not_parse_is_content(tokenizers: dict[str, HFTokenizer]) -> None:
    tokenizer = tokenizers["qwen3"]
    for text in ('<tool_call>\n{"name": "weather", "arguments": [1]}\n</tool_call>', "<tool_call>no", "a <tool_call>"):
        reader = tokenizer.answer_reader()
        ids = [int(token) for token in tokenizer._escaping.encode(tokenizer._escaping.to_placeholders(text, "")).ids]
        deltas = [*(reader.push(token) for token in ids), reader.end()]
        assert not any(delta.tool_calls for delta in deltas)
        assert "".join(delta.content for delta in deltas) == text
