"""The template: ids and mask against a slow reference, and the prompt as a prefix of what was trained."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.chat import ROLES, Conversation, Message, Tokenizer, render, render_many

TOKENIZER = Tokenizer.load()
CONTROL = TOKENIZER.special_ids

roles = st.sampled_from(["user", "assistant", "system"])
# Spans: tests/data/records/test_fields.py; tools and reasoning: test_agent_parts.py.
messages = st.tuples(roles, st.text(max_size=40), st.booleans()).map(lambda drawn: Message(*drawn))
conversations = st.builds(Conversation, st.lists(messages, min_size=1, max_size=6))


def slow_render(conversation: Conversation) -> tuple[list[int], list[int]]:
    """The template written token by token from its description."""
    ids: list[int] = []
    mask: list[int] = []
    for message in conversation.messages:
        content = TOKENIZER.encode(message.content)
        supervised = int(message.role == "assistant" and message.supervise)
        ids += [CONTROL["<|im_start|>"], CONTROL[f"<|{message.role}|>"], *content, CONTROL["<|im_end|>"]]
        mask += [0, 0, *[supervised] * len(content), supervised]
    return ids, mask


@given(st.lists(conversations, min_size=1, max_size=4))
def test_ids_and_mask_against_the_slow_reference(block: list[Conversation]) -> None:
    rendered = render_many(TOKENIZER, block)
    ids = [token for conversation in block for token in slow_render(conversation)[0]]
    mask = [bit for conversation in block for bit in slow_render(conversation)[1]]
    assert rendered.ids.tolist() == ids
    assert rendered.mask.tolist() == mask
    assert rendered.message_offsets[-1] == len(ids)
    assert rendered.conversation_offsets.tolist() == np.cumsum([0] + [len(c.messages) for c in block]).tolist()


@given(conversations, st.text(max_size=40))
def test_the_prompt_is_a_prefix_of_the_training_sequence(conversation: Conversation, answer: str) -> None:
    prompt = TOKENIZER.prompt_ids(conversation)
    full = render(TOKENIZER, Conversation([*conversation.messages, Message("assistant", answer)]))
    assert full.ids[: len(prompt)].tolist() == prompt
    # What is supervised after the prompt is the answer and its stop token, all of it.
    assert full.mask[len(prompt) :].tolist() == [1] * (len(full.ids) - len(prompt))
    assert full.ids[len(prompt) :].tolist() == [*TOKENIZER.encode(answer), TOKENIZER.stop_id]


@given(conversations)
def test_special_tokens_come_only_from_the_template(conversation: Conversation) -> None:
    typed = "".join(CONTROL)
    spiked = Conversation([Message(m.role, typed + m.content, m.supervise) for m in conversation.messages])
    ids = render(TOKENIZER, spiked).ids
    assert int((ids >= 100_257).sum()) == 3 * len(conversation.messages)
    assert TOKENIZER.decode(ids).count(typed) >= len(conversation.messages)


def test_plain_text_is_supervised_whole_with_its_end() -> None:
    rendered = render(TOKENIZER, Conversation([Message("text", "one two")]))
    end = TOKENIZER.end_of_text_id
    assert rendered.ids.tolist() == [end, *TOKENIZER.encode("one two"), end]
    assert rendered.mask.tolist() == [0, 1, 1, 1]


def test_an_unmapped_role_is_refused() -> None:
    with pytest.raises(KeyError):
        render(TOKENIZER, Conversation([Message("bot", "hi")]))


def test_a_block_says_the_role_of_every_message() -> None:
    chat = Conversation([Message("system", "s"), Message("user", "q"), Message("assistant", "a")])
    block = render_many(TOKENIZER, [chat, Conversation([Message("text", "t")])])
    assert [ROLES[role] for role in block.role] == ["system", "user", "assistant", "text"]
