"""Records of preference pairs: every shape, its prompt once, its tools on both sides, or a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lumina.chat import Message, ToolCall
from lumina.data.preference.pair import OTHER_PROMPT, PROMPT_TWICE, Pair, from_pair
from lumina.data.records.fault import Fault
from lumina.data.records.fields import FieldTally


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


EGG = [turn("user", "How do I boil an egg?")]
GOOD, BAD = "Ten minutes.", "No idea."


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": EGG[0]["content"], "chosen": GOOD, "rejected": BAD},
        {"prompt": EGG, "chosen": [turn("assistant", GOOD)], "rejected": [turn("assistant", BAD)]},
        {
            "prompt": EGG[0]["content"],
            "chosen": [*EGG, turn("assistant", GOOD)],
            "rejected": [*EGG, turn("assistant", BAD)],
        },
        {"chosen": [*EGG, turn("assistant", GOOD)], "rejected": [*EGG, turn("assistant", BAD)]},
        {"instruction": EGG[0]["content"], "input": "", "chosen": GOOD, "rejected": BAD},
        {"question": EGG[0]["content"], "chosen": GOOD, "rejected": BAD},
        {
            "conversations": [{"from": "human", "value": EGG[0]["content"]}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        {  # as UltraFeedback has it: the chosen chat a second time
            "prompt": EGG[0]["content"],
            "messages": [*EGG, turn("assistant", GOOD)],
            "chosen": [*EGG, turn("assistant", GOOD)],
            "rejected": [*EGG, turn("assistant", BAD)],
            "score_chosen": 8.0,
        },
    ],
)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_pairs_in_every_shape_have_their_prompt_once(record: dict[str, Any], system: str | None) -> None:
    found = from_pair({**record, "system": system})
    assert isinstance(found, Pair), found
    opening = [] if system is None else [Message("system", system, supervise=False)]
    prompt = [*opening, Message("user", EGG[0]["content"], supervise=False)]
    assert list(found.chosen.messages) == [*prompt, Message("assistant", GOOD)]
    assert list(found.rejected.messages) == [*prompt, Message("assistant", BAD)]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "q", "chosen": [turn("user", "other"), turn("assistant", "a")], "rejected": "b"}, OTHER_PROMPT),
        ({"chosen": [turn("user", "p"), turn("assistant", "a")],
          "rejected": [turn("user", "q"), turn("assistant", "b")]}, OTHER_PROMPT),
        ({"chosen": "a", "rejected": "b"}, "no prompt, chosen and rejected"),
        ({"chosen": [turn("user", "q"), turn("assistant", "a")], "context": "doc",
          "rejected": [turn("user", "q"), turn("assistant", "b")]}, "field not used: context"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "tools": ["t"]}, "tool without a name"),
        ({"prompt": "q", "question": "r", "chosen": "a", "rejected": "b"}, "two fields for one thing"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ],
)  # fmt: skip
def test_pairs_that_are_none_are_refused(record: dict[str, Any], reason: str) -> None:
    found = from_pair(record)
    assert isinstance(found, Fault), found
    assert found.reason == reason


def test_each_vocabulary_is_asked_for_itself() -> None:
    """A pair whose prompt stands in `messages` must not make the next one's unrelated `messages` a prompt."""
    tally = FieldTally()
    whole = {"chosen": [*EGG, turn("assistant", GOOD)], "rejected": [*EGG, turn("assistant", BAD)]}
    assert isinstance(from_pair({"messages": EGG, "chosen": GOOD, "rejected": BAD}, tally), Pair)
    other = {**whole, "messages": [turn("user", "x"), turn("assistant", "something else")]}
    found = from_pair(other, tally)
    assert isinstance(found, Fault)
    assert found.reason == "field not used: messages"


def test_lists_kept_as_json_in_text_columns() -> None:
    found = from_pair({"prompt": "q", "chosen": '[{"role": "assistant", "content": "a"}]', "rejected": "b"})
    assert isinstance(found, Pair)
    assert found.chosen.messages[-1] == Message("assistant", "a")


CALLS = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "does it"}}]
CALLED = Message("assistant", "", tool_calls=(ToolCall("f", '{"a": 1}', "c1"),))
RESULT, SAID = Message("tool", "4", call_id="c1"), Message("assistant", GOOD, reasoning="hm")
AGENT = [
    turn("assistant", None, tool_calls=CALLS),
    turn("tool", 4, tool_call_id="c1"),
    turn("assistant", GOOD, reasoning_content="hm"),
]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": EGG[0]["content"], "chosen": AGENT, "rejected": BAD},
        {"prompt": EGG, "chosen": AGENT, "rejected": [turn("assistant", BAD)]},
        {"prompt": EGG[0]["content"], "chosen": [*EGG, *AGENT], "rejected": [*EGG, turn("assistant", BAD)]},
        {"chosen": [*EGG, *AGENT], "rejected": [*EGG, turn("assistant", BAD)]},
        {"instruction": EGG[0]["content"], "input": "", "chosen": AGENT, "rejected": BAD},
        {"question": EGG[0]["content"], "chosen": AGENT, "rejected": BAD},
        {"conversations": [{"from": "human", "value": EGG[0]["content"]}], "chosen": AGENT, "rejected": BAD},
        {"messages": EGG, "chosen": AGENT, "rejected": turn("assistant", BAD)},
    ],
)
@pytest.mark.parametrize("key", ["tools", "functions", "available_tools"])
def test_calls_on_a_side_and_tools_for_both_in_every_shape(record: dict[str, Any], key: str) -> None:
    for tools in (TOOLS, json.dumps(TOOLS), [TOOLS[0]["function"]]):
        found = from_pair({**record, key: tools})
        assert isinstance(found, Pair), found
        prompt = Message("user", EGG[0]["content"], supervise=False)
        assert list(found.chosen.messages) == [prompt, CALLED, RESULT, SAID]
        assert list(found.rejected.messages) == [prompt, Message("assistant", BAD)]
        assert found.chosen.tools == found.rejected.tools
        assert [json.loads(tool) for tool in found.chosen.tools] == TOOLS


def test_sides_that_differ_in_their_calls_alone() -> None:
    other = [turn("assistant", None, tool_calls=[{"name": "f", "arguments": {"a": 2}}])]
    found = from_pair({"prompt": EGG, "chosen": AGENT[:1], "rejected": other})
    assert isinstance(found, Pair), found
    assert found.chosen.messages[-1] == CALLED
    assert found.rejected.messages[-1].tool_calls == (ToolCall("f", '{"a": 2}'),)


def test_a_prompt_may_hold_calls_and_results() -> None:
    prompt = [*EGG, *AGENT[:2]]
    for record in (
        {"prompt": prompt, "chosen": GOOD, "rejected": BAD},
        {"chosen": [*prompt, turn("assistant", GOOD)], "rejected": [*prompt, turn("assistant", BAD)]},
    ):
        found = from_pair(record)
        assert isinstance(found, Pair), found
        assert [message.supervise for message in found.chosen.messages] == [False, False, False, True]
        assert found.rejected.messages[1].tool_calls == CALLED.tool_calls


def test_prompts_that_differ_in_calls_results_or_tools_are_refused() -> None:
    def whole(*prompt: dict[str, Any], answer: str) -> list[dict[str, Any]]:
        return [*prompt, turn("assistant", answer)]

    system, other = turn("system", "s", tools=TOOLS), turn("system", "s", tools=[{"name": "g"}])
    for left, right in (
        ([*EGG, *AGENT[:2]], [*EGG, AGENT[0], turn("tool", 5, tool_call_id="c1")]),
        ([system, *EGG], [other, *EGG]),
        ([system, *EGG], [turn("system", "s"), *EGG]),
    ):
        record = {"prompt": left, "chosen": whole(*left, answer=GOOD), "rejected": whole(*right, answer=BAD)}
        found = from_pair(record)
        assert isinstance(found, Fault), found
        assert found.reason == OTHER_PROMPT
    twice = from_pair({"prompt": [system, *EGG], "chosen": GOOD, "rejected": BAD, "tools": [{"name": "g"}]})
    assert isinstance(twice, Fault)
    assert twice.reason == "two fields for one thing"
    same = from_pair({"prompt": [system, *EGG], "chosen": GOOD, "rejected": BAD, "tools": TOOLS})
    assert isinstance(same, Pair)
    assert [json.loads(tool) for tool in same.rejected.tools] == TOOLS


def called(number: str, arguments: Any = '{"a": 1}') -> dict[str, Any]:
    return turn("assistant", None, tool_calls=[{"id": number, "name": "f", "arguments": arguments}])


def test_ids_of_calls_make_no_other_answer_and_no_other_prompt() -> None:
    same = from_pair({"prompt": "q", "chosen": called("1"), "rejected": called("2", {"a": 1})})
    assert isinstance(same, Fault)
    assert same.reason == "chosen and rejected are the same"
    sides = [[*EGG, called(n), turn("tool", "r", tool_call_id=n), turn("assistant", n)] for n in ("c1", "z9")]
    found = from_pair({"chosen": sides[0], "rejected": sides[1]})
    assert isinstance(found, Pair)
    for side, number in zip(found, ("c1", "z9"), strict=True):
        assert [message.supervise for message in side.messages] == [False, False, False, True]
        assert side.messages[1].tool_calls[0].id == side.messages[2].call_id == number


@pytest.mark.parametrize("nothing", ["", turn("assistant", ""), []])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_side_without_an_answer_is_named(side: str, nothing: Any) -> None:
    found = from_pair({"prompt": "q", "chosen": GOOD, "rejected": BAD, side: nothing})
    assert isinstance(found, Fault)
    assert (found.reason, found.detail) == ("empty", f"{side}: no answer")


def test_scores_of_the_sides_are_harmless() -> None:
    tally = FieldTally()
    assert isinstance(from_pair({"prompt": "q", "chosen": GOOD, "rejected": BAD, "score_chosen": 8.0}, tally), Pair)
    assert tally.totals()["harmless"] == {"score_chosen": 1}


def test_pairs_as_openai_has_them() -> None:
    asked = {"messages": EGG, "tools": [], "parallel_tool_calls": True}
    sides = {"preferred_output": [turn("assistant", GOOD)], "non_preferred_output": [turn("assistant", BAD)]}
    found = from_pair({"input": asked, **sides})
    assert isinstance(found, Pair), found
    assert [message.content for message in found.chosen.messages] == [EGG[0]["content"], GOOD]
    assert [message.content for message in found.rejected.messages] == [EGG[0]["content"], BAD]


def test_texts_that_begin_with_the_prompt_are_not_rendered_after_it() -> None:
    asked = EGG[0]["content"]
    found = from_pair({"prompt": asked, "chosen": f"{asked} {GOOD}", "rejected": f"{asked} {BAD}"})
    assert isinstance(found, Fault)
    assert found.reason == PROMPT_TWICE
    assert isinstance(from_pair({"prompt": asked, "chosen": f"{asked} {GOOD}", "rejected": BAD}), Pair)
    assert isinstance(from_pair({"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi!"}), Pair)


def test_sides_in_a_column_that_are_no_json_are_not_taken_for_a_text() -> None:
    chats = [str([*EGG, turn("assistant", answer)]) for answer in (GOOD, BAD)]
    found = from_pair({"prompt": "q", "chosen": chats[0], "rejected": chats[1]})
    assert isinstance(found, Fault)
    assert found.reason == "a Python literal, not JSON"
