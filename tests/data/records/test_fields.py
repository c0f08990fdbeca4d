"""Law 4 for the whole record: every field of every format is used, known to be harmless, or counted as refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lumina.chat import Conversation, Message, render
from lumina.data import prepare
from lumina.data.account import MOST_REASONS, OTHER_SUBREASONS, Account
from lumina.data.formats import convert
from lumina.data.records.fault import Fault
from lumina.data.records.fields import CONTENT, HARMLESS, MOST_CHARACTERS, MOST_NAMES, FieldTally, is_empty
from tests.data.helpers import TOKENIZER, Settings, chat, write_jsonl

U, A = Message("user", "q"), Message("assistant", "a")


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def read(record: Any) -> list[Message]:
    found = convert(record)
    assert isinstance(found, Conversation), found
    return list(found.messages)


HISTORY = {
    "instruction": "And what do they eat?",
    "input": "",
    "output": "Mostly krill.",
    "system": "You know animals.",
    "history": [["Which is the biggest animal?", "The blue whale."], ["How long is it?", "Up to thirty metres."]],
}


def test_history_comes_before_the_instruction() -> None:
    assert read(HISTORY) == [
        Message("system", "You know animals."),
        Message("user", "Which is the biggest animal?"),
        Message("assistant", "The blue whale."),
        Message("user", "How long is it?"),
        Message("assistant", "Up to thirty metres."),
        Message("user", "And what do they eat?"),
        Message("assistant", "Mostly krill."),
    ]


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"instruction": "q", "context": "c", "response": "a", "category": "closed_qa"}, "q\n\nc"),
        ({"instruction": "q", "context": "", "response": "a"}, "q"),
        ({"instruction": "q", "context": "c", "output": "a"}, "q\n\nc"),
        ({"question": "q", "answer": "a"}, "q"),
        ({"question": "q", "context": "c", "answer": "a"}, "q\n\nc"),
        ({"prompt": "q", "context": "c", "completion": "a"}, "q\n\nc"),
        ({"query": "q", "response": "a"}, "q"),
        ({"prompt": "q", "answer": "a"}, "q"),
        ({"prompt": "q", "completion": "a", "label": True}, "q"),
    ],
)
def test_questions_and_answers_by_their_usual_names(record: dict[str, Any], question: str) -> None:
    assert read(record) == [Message("user", question), A]


@pytest.mark.parametrize(
    "messages",
    [
        [turn("User", "q"), turn("ASSISTANT", "a")],
        [turn(" human ", "q"), turn("gpt", "a")],
        [turn("prompter", "q"), turn("model", "a")],
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        [turn("system", ""), turn("user", "q"), turn("assistant", "a")],
        [turn("system", None), turn("user", "q"), turn("assistant", "a")],
        [turn("user", "q"), turn("assistant", "a"), turn("assistant", " ")],
        [turn("user", "q"), turn("assistant", None, refusal="a")],
        [
            turn("user", [{"type": "input_text", "text": "q"}]),
            turn("assistant", [{"type": "output_text", "text": "a"}]),
        ],
    ],
)
@pytest.mark.parametrize("key", ["messages", "conversations", "conversation"])
def test_roles_keys_and_empty_messages_in_every_format_alike(messages: list[Any], key: str) -> None:
    assert read({key: messages}) == [U, A]


def test_a_developer_is_the_system_and_a_tool_has_a_role_of_its_own() -> None:
    found = read({"messages": [turn("developer", "s"), turn("user", "q"), turn("tool", "t"), turn("assistant", "a")]})
    assert found == [Message("system", "s"), U, Message("tool", "t"), A]


@pytest.mark.parametrize(
    "flag",
    ["weight", "train", "training", "trainable", "loss", "loss_mask", "is_trainable", "do_train", "compute_loss"],
)
@pytest.mark.parametrize("value", [False, 0, 0.0])
def test_any_flag_masks_its_message(flag: str, value: Any) -> None:
    answers = [turn("assistant", "wrong", **{flag: value}), turn("user", "?"), turn("assistant", "a", **{flag: True})]
    assert [m.supervise for m in read({"messages": [turn("user", "q"), *answers]}) if m.role == "assistant"] == [
        False,
        True,
    ]
    bad = convert({"messages": [turn("user", "q"), turn("assistant", "a", **{flag: "no"})]})
    assert isinstance(bad, Fault)
    assert bad.reason == "wrong type"


def span(first: int, last: int, train: bool = False) -> dict[str, Any]:
    return {"begin_offset": first, "end_offset": last, "train": train}


def test_spans_are_masked_token_by_token() -> None:
    """Every token with a character of a masked span is masked, by an independent walk over the text."""
    text = "Der Löwe schläft 🦁 und sieben mal acht ist 54, falsch."
    found = read({"messages": [turn("user", "q"), turn("assistant", text, train_detail=[span(4, 8), span(17, 17)])]})
    rendered = render(TOKENIZER, Conversation(found))
    start = rendered.message_offsets[1] + 2
    ids = rendered.ids[start:-1].tolist()
    supervised, at = [], 0
    hidden = {i for first, last in ((4, 8), (17, 17)) for i in range(first, last + 1)}
    places = [index for index, character in enumerate(text) for _ in character.encode()]
    for token in ids:
        size = len(TOKENIZER.token_bytes(token))
        supervised.append(int(not hidden & set(places[at : at + size])))
        at += size
    assert rendered.mask[start:-1].tolist() == supervised
    assert 0 in supervised
    assert 1 in supervised
    assert rendered.mask[-1] == 1  # the stop token


@pytest.mark.parametrize("bad", [[span(0, 99)], [span(2, 1)], [{"begin_offset": 0}], ["x"], [span(-1, 0)]])
def test_spans_that_are_none_are_refused(bad: Any) -> None:
    found = convert({"messages": [turn("user", "q"), turn("assistant", "answer", train_detail=bad)]})
    assert isinstance(found, Fault)


def test_an_answer_masked_whole_teaches_nothing() -> None:
    found = convert({"messages": [turn("user", "q"), turn("assistant", "wrong", train_detail=[span(0, 4)])]})
    assert isinstance(found, Fault)
    assert found.reason == "no assistant turn"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "q", "completion": "a", "label": False}, "label is false: no answer to teach"),
        ({**chat("q", "a"), "label": False}, "label is false: no answer to teach"),
        ({**chat("q", "a"), "history": [["x", "y"]]}, "field not used: history"),
        ({**chat("q", "a"), "prompt": "another"}, "field not used: prompt"),
        ({**chat("q", "a"), "chosen": "better"}, "field not used: chosen"),
        ({"messages": [turn("user", "q"), turn("assistant", "a", value="b")]}, "two fields for one thing"),
        ({"messages": [turn("system", "s"), turn("user", "q"), turn("assistant", "a")], "system": "t"},
         "two fields for one thing"),
        ({"instruction": "q", "output": "a", "response": "b"}, "two fields for one thing"),
        ({"instruction": "q", "input": "i", "context": "c", "output": "a"}, "two fields for one thing"),
        ({"text": "t", "completion": "c"}, "field not used: completion"),
        ({"text": "a", "answer": "cat"}, "field not used: answer"),
        ({**chat("q", "a"), "train": False}, "field not used: train"),
        ({"messages": [turn("user", "q"), turn("assistant", "a", Train=False)]}, "field not used: Train"),
        ({"messages": [turn("user", "q"), turn("assistant", "a", lossMask=0)]}, "field not used: lossMask"),
        ({"messages": [turn("user", "q"), turn("assistant", "a", noTrain=True)]}, "field not used: noTrain"),
        ({"messages": [turn("user", "q"), turn("assistant", "a", ignoreLoss=1)]}, "field not used: ignoreLoss"),
        ({"messages": [turn("user", "q", train_on_input=True), turn("assistant", "a")]},
         "field not used: train_on_input"),
        ({"messages": [turn("user", "q"), turn("assistant", "a", additional_kwargs={"tool_calls": [{"name": "f"}]})]},
         "field not used: additional_kwargs"),
        ({"messages": [turn("user", "q"), turn("assistant", "a", parts=[{"text": "b"}])]}, "field not used: parts"),
        ({**chat("q", "a"), "systemInstruction": {"parts": [{"text": "s"}]}}, "field not used: systemInstruction"),
        ({**chat("q", "a"), "Persona": "a pirate"}, "field not used: Persona"),
        ({**chat("q", "a"), "toolCalls": [{"id": "c"}]}, "field not used: toolCalls"),
        ({"text": "t", "tools": [{"name": "f"}]}, "field not used: tools"),
        ({**chat("q", "a"), "reasoning": "r"}, "field not used: reasoning"),
        ({"messages": [turn("user", "q", tools=[{"name": "f"}]), turn("assistant", "a")]}, "field not used: tools"),
        ({"messages": [turn("user", "q", thinking="t"), turn("assistant", "a")]}, "field not used: thinking"),
        ({"messages": [turn("system", "s", reasoning="t"), turn("user", "q"), turn("assistant", "a")]},
         "field not used: reasoning"),
        ({"messages": [turn("user", "q", tool_calls=[{"name": "f"}]), turn("assistant", "a")]},
         "field not used: tool_calls"),
        ({"prompt": "q", "completion": [turn("assistant", "a")], "thinking": "t"}, "field not used: thinking"),
        ({"prompt": "q", "completion": "a", "label": "False"}, "label is false: no answer to teach"),
        ({"messages": [turn("user", "q"), turn("assistant", [{"type": "text", "text": "a", "thinking": "t"}])]},
         "field not used: thinking"),
        ({"messages": [turn("user", "q"), {"role": "assistant", "from": "user", "content": "a"}]},
         "two fields for one thing"),
        ({"role": "user", "text": "hi"}, "unknown format"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "unknown format"),
        ({"messages": [turn("user", ""), turn("assistant", "a")]}, "empty"),
    ],
)  # fmt: skip
def test_content_without_a_place_is_refused_by_name(record: Any, reason: str) -> None:
    found = convert(record)
    assert isinstance(found, Fault)
    assert found.reason == reason


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": "q", "prompt_id": "7"},
        {"text": "<|user|>q<|assistant|>a", "tools": [], "history": [], "images": None},
        {"response": "a", "source": "here", "score": 0.5},
        {"system": "  ", "reasoning": ""},
        {"something_new": {"deep": ["value"]}},
        {"weight": 1, "train": True, "Trainable": True},
        {"no_train": False, "train_on_inputs": False, "additional_kwargs": {}},
    ],
)
def test_what_is_empty_repeated_harmless_or_unknown_costs_nothing(more: dict[str, Any]) -> None:
    assert read({**chat("q", "a"), **more}) == [U, A]


def test_unknown_fields_are_counted_with_an_example_each(tmp_path: Path) -> None:
    records = [{**chat("q", "a"), "mood": f"m{i}", "id": str(i)} for i in range(40)]
    records[3] = {**chat("q", "a"), "history": [["x", "y"]]}
    account = Account.from_dict(prepare([write_jsonl(tmp_path / "d.jsonl", records)], Settings(), TOKENIZER).account)
    account.check()
    assert account.fields["unknown"] == {"mood": 39}
    assert account.fields["harmless"] == {"id": 39}
    assert account.fields["refused"] == {"history": 1}
    assert account.fields["used"] == {"messages": 39, "role": 80, "content": 80}
    assert account.unknown_fields == {"mood": f"{tmp_path / 'd.jsonl'}:1: 'm0'"}
    assert (
        "fields         199 used, 39 harmless, 0 empty or repeated, 39 unknown, 0 set aside, 1 refused"
        in account.report()
    )


def test_messages_left_out_of_a_used_record_are_counted(tmp_path: Path) -> None:
    records = [{"messages": [turn("system", ""), turn("user", "q"), turn("assistant", "a"), turn("assistant", "")]}]
    account = Account.from_dict(prepare([write_jsonl(tmp_path / "d.jsonl", records)], Settings(), TOKENIZER).account)
    account.check()
    assert account.messages_dropped == {"empty system message": 1, "empty last answer": 1}
    assert (account.messages, account.messages_supervised, account.messages_masked) == (4, 1, 1)


def test_the_tally_is_bounded_whatever_the_keys_are() -> None:
    tally = FieldTally()
    for i in range(5000):
        convert({**chat("q", "a"), f"key{i}": i}, tally=tally)
    totals = tally.totals()
    assert sum(totals["unknown"].values()) == 5000
    assert len(totals["unknown"]) <= MOST_NAMES + 1
    assert len(tally.examples) == MOST_NAMES


@pytest.mark.parametrize("name", ["prompt" + "_" * 50_000, "train" + "-" * 50_000, "label" + "-" * 50_000])
def test_a_fault_holds_no_name_of_any_length(name: str) -> None:
    found = convert({**chat("q", "a"), name: False if name.startswith(("train", "label")) else "another"})
    assert isinstance(found, Fault)
    assert max(len(found.reason), len(found.detail)) < 3 * MOST_CHARACTERS


def test_the_reasons_are_bounded_whatever_the_keys_are() -> None:
    """Those that the data gives a name; one of ours is told as what it is, also after them."""
    whole, others = Account(lines=3001, messages=0), f"field not used: {OTHER_SUBREASONS}"
    for part in range(3):
        account = Account()
        for i in range(1000):
            account.fault(f"field not used: {part}-{i}", i, messages=2)
        whole.merge(account, "a.jsonl", 0)
    whole.fault("broken JSON", 3000, messages=2)
    whole.check()
    assert len(whole.faults) == len(whole.messages_dropped) == MOST_REASONS + 2
    assert whole.faults["broken JSON"].lines == 1
    assert whole.faults[others].lines == 3000 - MOST_REASONS
    assert whole.messages_dropped[f"line skipped: {others}"] == 2 * (3000 - MOST_REASONS)


def test_the_vocabulary_has_one_use_for_each_key() -> None:
    assert not CONTENT & HARMLESS


def test_lists_kept_as_json_in_text_columns() -> None:
    turns = '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'
    for record in ({"messages": turns}, {"conversations": turns}):
        assert read(record) == [U, A]
    answer = '[{"role": "assistant", "content": "a"}]'
    assert read({"prompt": "q", "completion": answer}) == [U, A]
    assert read({"prompt": "q", "completion": '{"a": 1}'})[-1].content == '{"a": 1}'  # JSON that is the answer


def test_a_given_format_sets_the_keys_of_others_aside_and_counts_each_once() -> None:
    tally = FieldTally()
    assert isinstance(convert({**chat("q", "a"), "text": "another"}, "messages", tally), Conversation)
    totals = tally.totals()
    assert totals["set aside"] == {"text": 1}
    assert "empty or repeated" not in totals


def test_emptiness() -> None:
    assert all(map(is_empty, (None, "", " \n", [], {}, [None, ""], {"a": []}, False)))
    assert not any(map(is_empty, ("x", [0], {"a": "b"}, 0.5, True)))
    assert np.all([is_empty([]), not is_empty(1)])


@pytest.mark.parametrize("name", ["System Prompt", "chat history", "chat-history", "contexts", "toolDefinitions"])
def test_content_is_known_however_its_name_is_written(name: str) -> None:
    found = convert({"question": "q", "answer": "a", name: "words"})
    assert isinstance(found, Fault)
    assert found.reason == f"field not used: {name}"


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_message_by_its_usual_names(name: str) -> None:
    for record in ({"question": "q", "answer": "a"}, chat("q", "a")):
        assert read({name: "Be brief.", **record}) == [Message("system", "Be brief."), U, A]
        both = convert({"system": "Be brief.", "system_prompt": "Be long.", **record})
        assert isinstance(both, Fault)
        assert both.reason == "two fields for one thing"


@pytest.mark.parametrize("role", ["system", "tool", "user", "assistant"])
def test_a_message_without_any_content_is_no_empty_one(role: str) -> None:
    """Its words may stand under a key that nobody knows."""
    turns = [turn("user", "q"), {"role": role, "body": "words"}, turn("assistant", "a")]
    found = convert({"messages": turns})
    assert isinstance(found, Fault)
    assert found.reason == "wrong type"


@pytest.mark.parametrize("quote", [str, lambda turns: str(turns).replace("'", '"').replace("ask", 'a"s"k')])
@pytest.mark.parametrize("key", ["messages", "conversations", "prompt", "completion", "history"])
def test_messages_in_a_column_that_are_no_json_are_not_taken_for_a_text(key: str, quote: Any) -> None:
    text = quote([turn("user", "I ask"), turn("assistant", "yes")])
    found = convert(
        {"prompt": "q", "completion": "a", key: text} if key in ("prompt", "completion", "history") else {key: text}
    )
    assert isinstance(found, Fault)
    assert found.reason in ("a Python literal, not JSON", "broken JSON")


def test_a_text_with_braces_stays_one() -> None:
    for text in ("{'role': 'user'} is a dict: what is its length?", "[{x}]", "{'a': 1}"):
        assert read({"prompt": text, "completion": "a"}) == [Message("user", text), A]


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_messages_kept_as_a_list_for_each_field(key: str) -> None:
    assert read({key: {"from": ["human", "gpt"], "value": ["q", "a"]}}) == [U, A]
    for uneven in ({"from": ["human", "gpt"], "value": ["q"]}, {"role": "user", "content": "q"}):
        assert isinstance(convert({key: uneven}), Fault)


def test_messages_in_a_column_called_text_are_not_learned_as_one() -> None:
    turns = [turn("user", "q"), turn("assistant", "a")]
    for text in (json.dumps(turns), str(turns)):
        found = convert({"text": text})
        assert isinstance(found, Fault)
        assert found.reason == "unknown format"
    assert isinstance(convert({"text": "[1] A footnote. {'role': 'user'}"}), Conversation)
