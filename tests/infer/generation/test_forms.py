"""Forms of answers with Lumina's own template: what begins a call and reasoning, and answers that are to have none."""

from __future__ import annotations

import pytest

from lumina.chat import Conversation, Tokenizer
from lumina.infer import Sampling, generate
from lumina.infer.generation.forms import calling_tokens, reasoning_tokens
from tests.infer.taught_models import ASKED, REASONING, WEATHER, taught_model

GREEDY = Sampling(temperature=0, max_length=80)


def test_the_tokens_that_begin_them() -> None:
    tokenizer = Tokenizer.load("im-roles-2")
    assert calling_tokens(tokenizer) == {tokenizer.special_ids["<|tool_call|>"]}
    assert reasoning_tokens(tokenizer) == {tokenizer.special_ids["<|reasoning|>"]}
    first = Tokenizer.load("im-roles-1")
    assert calling_tokens(first) == reasoning_tokens(first) == frozenset()


@pytest.mark.parametrize("thinking", [None, True, False])
def test_an_answer_that_is_to_have_no_reasoning_has_none(thinking: bool | None) -> None:
    model, tokenizer = taught_model()
    prompt = tokenizer.prompt_ids(Conversation([ASKED], tools=(WEATHER,)), thinking)
    (answer,) = generate(model, tokenizer, [prompt], GREEDY, thinking)
    assert answer.reasoning == ("" if thinking is False else REASONING)
    assert (tokenizer.special_ids["<|reasoning|>"] in answer.ids) == (thinking is None)  # else the prompt's, or nowhere
