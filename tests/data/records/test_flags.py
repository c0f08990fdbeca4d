"""Whatever a flag is called and however it is spelt, what it sets aside is not taught."""

from __future__ import annotations

from typing import Any

import pytest

from lumina.chat import Conversation
from lumina.data.formats import convert
from lumina.data.records.fault import NOT_TO_BE_TAUGHT, Fault


def chat(**flags: Any) -> dict[str, Any]:
    """Two answers, the first of which has the flags."""
    return {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "wrong", **flags},
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "a"},
        ]
    }


def supervised(record: Any) -> list[str]:
    found = convert(record)
    assert isinstance(found, Conversation), found
    return [message.content for message in found.messages if message.supervise and message.role == "assistant"]


@pytest.mark.parametrize("flags", [{"train_on_turn": False}, {"loss_weight": 0.0}, {"masked": True}, {"no_loss": 1}])
def test_flags_for_and_against_mask_the_message(flags: dict[str, Any]) -> None:
    assert supervised(chat(**flags)) == ["a"]
    assert supervised(chat(**{name: 1 - value for name, value in flags.items()})) == ["wrong", "a"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("use_in_loss", False), ("includeInTraining", 0), ("skip_training", True), ("trained_on", "False")),
        *(("Train", False), ("loss mask", 0), ("isMasked", True), ("mask", False), ("mask", 1)),
    ],
)
def test_a_flag_of_another_name_or_spelling_is_not_taught_over(name: str, value: Any) -> None:
    for record in (chat(**{name: value}), {**chat(), name: value}):
        found = convert(record)
        assert isinstance(found, Fault)
        assert found.reason == f"field not used: {name}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("use_in_loss", True), ("skip_training", False), ("Train", True), ("isMasked", 0), ("masked", None)),
        *(("train_steps", 0), ("num_train_tokens", 1), ("trainer", False), ("masked_at", "x"), ("is_correct", False)),
    ],
)
def test_what_sets_nothing_aside_costs_nothing(name: str, value: Any) -> None:
    assert supervised(chat(**{name: value})) == ["wrong", "a"]
    assert supervised({**chat(), name: value}) == ["wrong", "a"]


@pytest.mark.parametrize("name", ["label", "Label", "kto_tag", "desirable"])
@pytest.mark.parametrize("value", [False, "False", 0, "0"])
def test_an_answer_that_is_not_to_be_given(name: str, value: Any) -> None:
    found = convert({"prompt": "q", "completion": "a", name: value})
    assert isinstance(found, Fault)
    assert found.reason == NOT_TO_BE_TAUGHT
    assert isinstance(convert({"prompt": "q", "completion": "a", name: True}), Conversation)


def test_the_number_of_a_class_is_no_verdict() -> None:
    assert isinstance(convert({"text": "a review", "label": 0}), Conversation)
    assert isinstance(convert({**chat(), "label": 0}), Conversation)
    assert isinstance(convert({**chat(), "label": False}), Fault)


def test_thinking_switched_off_is_not_left_out_in_silence() -> None:
    for more in ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}):
        assert isinstance(convert({**chat(), **more}), Fault)
    assert isinstance(convert({**chat(), "chat_template_kwargs": {}}), Conversation)
