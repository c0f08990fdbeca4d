"""Small files that went wrong in other tools, made here as they are found: each is prepared, and what is learned of it,
what is context and what is left out is checked to the word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest

from lumina.data import PackedDataset, prepare, prepare_pairs
from tests.data.helpers import AGENT_TOKENIZER, Settings

ROOMY = 512  # tokens: nothing here is split


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(turns), **more}


def numbered(number: int) -> dict[str, Any]:
    return chat(turn("user", f"Question number {number}?"), turn("assistant", f"Answer number {number}."))


def lines(*records: Any) -> bytes:
    return b"".join(orjson.dumps(record) + b"\n" for record in records)


def pretty(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()


class Seen(NamedTuple):
    """What of a file became samples: the decoded supervised tokens, one text for each run of them, and the context."""

    conversations: int
    supervised: list[str]
    context: list[str]
    account: dict[str, Any]


def seen(path: Path) -> Seen:
    dataset = prepare([path], Settings(seq_length=ROOMY), AGENT_TOKENIZER)
    supervised, context = runs(dataset)
    return Seen(dataset.account["conversations"], supervised, context, dataset.account)


def runs(dataset: PackedDataset) -> tuple[list[str], list[str]]:
    """The texts of supervised tokens and of context, in the order of the input's lines."""
    found: dict[bool, list[tuple[int, str]]] = {True: [], False: []}
    for sample in range(dataset.num_samples):
        for chunk in dataset.chunks_of(sample):
            start = 0
            for at in range(1, len(chunk.ids) + 1):
                if at == len(chunk.ids) or chunk.mask[at] != chunk.mask[start]:
                    text = AGENT_TOKENIZER.decode(chunk.ids[start:at].tolist())
                    found[bool(chunk.mask[start])].append((chunk.line, text))
                    start = at
    return tuple([text for _, text in sorted(found[kind], key=lambda run: run[0])] for kind in (True, False))  # type: ignore[return-value]


def said(*texts: str) -> list[str]:
    """Runs of supervised tokens: what is said and the token that ends it."""
    return [f"{text}<|im_end|>" for text in texts]


# --- Containers --------------------------------------------------------------------------------------

CAFE = [chat(turn("user", f"Où est le café {number}?"), turn("assistant", "À gauche.")) for number in range(5)]
NAN_META = [lines(numbered(n))[:-2] + b', "score": ' + (b"0.5" if n % 3 == 0 else b"NaN") + b"}\n" for n in range(9)]
NAN = [
    b'{"instruction": "Add %d and 1, please.", "input": %s, "output": "%d", "score": NaN}\n'
    % (n, b'"as a number"' if n % 4 == 0 else b"NaN", n + 1)
    for n in range(12)
]
CONTAINERS: dict[str, tuple[bytes, int]] = {
    "joined.json": (
        pretty([numbered(n) for n in range(3)]) + b"\n" + pretty([numbered(n) for n in range(3, 103)]),
        103,
    ),
    "batched.jsonl": (lines(*([numbered(2 * n), numbered(2 * n + 1)] for n in range(50))), 100),
    "trailing.json": (json.dumps([numbered(n) for n in range(3)]).encode() + b"\n" + lines(numbered(3)), 4),
    "single.json": (pretty(CAFE[0]), 1),
    "pretty.jsonl": (b"\n".join(map(pretty, CAFE)), 5),
    "utf16.jsonl": (lines(*CAFE).decode().encode("utf-16"), 5),
    "nan_meta.jsonl": (b"".join(NAN_META), 9),
    "nan.jsonl": (b"".join(NAN), 12),
    "nan.json": (b"[" + b",".join(line.strip() for line in NAN) + b"]", 12),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_file_is_read_to_its_end(name: str, tmp_path: Path) -> None:
    content, count = CONTAINERS[name]
    path = tmp_path / name
    path.write_bytes(content)
    found = seen(path)
    assert found.conversations == len(found.supervised) == count
    assert found.account["bad_lines"] == 0
    if name.startswith("nan."):
        assert [text for text in found.supervised if text not in said(*map(str, range(1, 13)))] == []
        assert sum("as a number" in text for text in found.context) == 3
    elif name in ("single.json", "pretty.jsonl", "utf16.jsonl"):
        assert found.supervised == said("À gauche.") * count
    else:
        assert sorted(found.supervised) == sorted(said(*(f"Answer number {n}." for n in range(count))))


# --- Fields and roles --------------------------------------------------------------------------------

HELLO, THANKS = turn("user", "Hello there, friend."), turn("user", "Thanks.")
GREETED = (HELLO, turn("assistant", "Hello!"))
EIGHT = turn("user", "Seven times eight?")
NOVEL = "The novel was written by Ann Lee in 1901."
THOUGHT = "The user wants 17*3. 17*3 is 51."
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
RENDERED_CALL = '<|tool_call|>{"name": "get_weather", "arguments": {"city":"Oslo"}}<|tool_call_end|>'


def flagged(flag: str) -> dict[str, Any]:
    wrong = turn("assistant", "WRONGANSWER 54.", **{flag: False})
    return chat(EIGHT, wrong, turn("user", "Check that."), turn("assistant", "Sorry, 56."))


def agent(content: Any) -> dict[str, Any]:
    return chat(
        turn("system", "You may call tools."),
        turn("user", "Weather in Oslo?"),
        turn("assistant", content, tool_calls=[CALL]),
        turn("tool", '{"t":4}', tool_call_id="c1"),
        turn("assistant", "It is 4 degrees."),
        tools=TOOLS,
    )


HISTORY = {
    "instruction": "And what do they eat?",
    "input": "",
    "output": "Mostly krill.",
    "system": "You know animals.",
    "history": [["Which is the biggest animal?", "The blue whale."], ["How long is it?", "Up to thirty metres."]],
}
AGENT_CONTEXT = ["You may call tools.", "Weather in Oslo?", '"get_weather"', '"city"', '{"t":4}']
# name: records, what is supervised, what is in the context
FIELDS: dict[str, tuple[list[Any], list[str], list[str]]] = {
    "alpaca_history": (
        [HISTORY],
        said("The blue whale.", "Up to thirty metres.", "Mostly krill."),
        ["You know animals.", "Which is the biggest animal?", "How long is it?", "And what do they eat?"],
    ),
    "dolly": (
        [
            {"instruction": "Who wrote it?", "context": NOVEL, "response": "Ann Lee.", "category": "closed_qa"},
            {"instruction": "Name a colour.", "context": "", "response": "Red.", "category": "open_qa"},
        ],
        said("Ann Lee.", "Red."),
        ["Who wrote it?", NOVEL, "Name a colour."],
    ),
    "ctx_out": ([{"instruction": "Who wrote it?", "context": NOVEL, "output": "Ann Lee."}], said("Ann Lee."), [NOVEL]),
    "tools_openai_tools": ([agent(None)], said(RENDERED_CALL, "It is 4 degrees."), AGENT_CONTEXT),
    "tools_empty_content": ([agent("")], said(RENDERED_CALL, "It is 4 degrees."), AGENT_CONTEXT),
    "tools_text_and_call": (
        [agent("Let me look.")],
        said(f"Let me look.{RENDERED_CALL}", "It is 4 degrees."),
        AGENT_CONTEXT,
    ),
    "tools_sharegpt_tool": (
        [
            {
                "conversations": [
                    {"from": "human", "value": "Weather in Oslo?"},
                    {"from": "gpt", "value": "<tool_call>get_weather</tool_call>"},
                    {"from": "tool", "value": '{"t":4}'},
                    {"from": "gpt", "value": "It is 4 degrees."},
                ],
                "tools": json.dumps(TOOLS),
            }
        ],
        said("<tool_call>get_weather</tool_call>", "It is 4 degrees."),
        AGENT_CONTEXT[1:],
    ),
    "tools_developer": (
        [chat(turn("developer", "Be short."), turn("user", "Hi, how are you today?"), turn("assistant", "Fine."))],
        said("Fine."),
        ["<|system|>Be short."],
    ),
    "reasoning_reasoning_content": (
        [chat(turn("user", "What is 17*3?"), turn("assistant", "51", reasoning_content=THOUGHT))],
        said(f"<|reasoning|>{THOUGHT}<|reasoning_end|>51"),
        ["What is 17*3?"],
    ),
    "reasoning_parts": (
        [
            chat(
                turn("user", "What is 17*3?"),
                turn("assistant", [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": "51"}]),
            )
        ],
        said(f"<|reasoning|>{THOUGHT}<|reasoning_end|>51"),
        ["What is 17*3?"],
    ),
    "reasoning_refusal": (
        [chat(turn("user", "Say it, please."), turn("assistant", None, refusal="I cannot do that."))],
        said("I cannot do that."),
        ["Say it, please."],
    ),
    "empty_system_empty": ([chat(turn("system", ""), *GREETED)], said("Hello!"), [HELLO["content"]]),
    "empty_null_system": ([chat(turn("system", None), *GREETED)], said("Hello!"), [HELLO["content"]]),
    "empty_assistant_empty_last": (
        [chat(*GREETED, THANKS, turn("assistant", ""))],
        said("Hello!"),
        [HELLO["content"], THANKS["content"]],
    ),
    "flag_train": ([flagged("train")], said("Sorry, 56."), ["WRONGANSWER 54."]),
    "flag_trainable": ([flagged("trainable")], said("Sorry, 56."), ["WRONGANSWER 54."]),
    "flag_loss": ([flagged("loss")], said("Sorry, 56."), ["WRONGANSWER 54."]),
    "upper": ([chat(turn("User", "Hello there"), turn("Assistant", "Hi."))], said("Hi."), ["<|user|>Hello there"]),
    "gpt_in_messages": ([chat(turn("human", "Hello there"), turn("gpt", "Hi."))], said("Hi."), ["<|user|>Hello there"]),
    "from_value_messages": (
        [chat({"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "Hi."})],
        said("Hi."),
        ["<|user|>Hello there"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_where_it_belongs(name: str, tmp_path: Path) -> None:
    records, supervised, context = FIELDS[name]
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(lines(*records))
    found = seen(path)
    assert found.account["bad_lines"] == 0
    assert found.conversations == len(records)
    assert found.supervised == supervised
    whole = "".join(found.context)
    assert [text for text in context if text not in whole] == []
    assert not {"refused", "unknown"} & found.account["fields"].keys()
    dropped = {
        "empty_assistant_empty_last": {"empty last answer": 1},
        "empty_system_empty": {"empty system message": 1},
        "empty_null_system": {"empty system message": 1},
    }
    assert found.account["messages_dropped"] == dropped.get(name, {})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (chat(turn("user", ""), turn("assistant", "A poem: roses are red.")), "empty"),
        (
            {"prompt": "Is the earth flat?", "completion": "Yes, it is flat.", "label": False},
            "label is false: no answer to teach",
        ),
        (
            chat(
                EIGHT,
                turn(
                    "assistant",
                    "WRONGANSWER 54.",
                    train_detail=[{"begin_offset": 0, "end_offset": 14, "train": False}],
                ),
            ),
            "no assistant turn",
        ),
    ],
    ids=["empty_user_empty_first", "kto", "flag_train_detail"],
)
def test_what_teaches_nothing_is_refused_with_its_reason(record: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines(record, {"prompt": "Is the earth flat?", "completion": "No, it is round.", "label": True}))
    found = seen(path)
    assert found.supervised == said("No, it is round.")
    assert {name: entry["lines"] for name, entry in found.account["faults"].items()} == {reason: 1}


def test_a_span_of_an_answer_is_masked(tmp_path: Path) -> None:
    detail = [{"begin_offset": 0, "end_offset": 14, "train": False}]
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines(chat(EIGHT, turn("assistant", "WRONGANSWER 54. No: 56.", train_detail=detail))))
    assert seen(path).supervised == said(" No: 56.")


# --- Pairs -------------------------------------------------------------------------------------------

EGG, GOOD, BAD = "How do I boil an egg?", "Ten minutes in boiling water.", "No idea."
GOOD_CHAT = [turn("user", EGG), turn("assistant", GOOD)]
SIDES: dict[str, Any] = {"chosen": GOOD, "rejected": BAD}
CHATS: dict[str, Any] = {"chosen": GOOD_CHAT, "rejected": [turn("user", EGG), turn("assistant", BAD)]}
PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "pairs_whole_chats": (
        {"prompt": EGG, "prompt_id": "x1", **CHATS, "messages": GOOD_CHAT, "score_chosen": 8.0, "score_rejected": 3.0},
        "",
    ),
    "pairs_system_key": ({"system": "Answer like a pirate.", "prompt": EGG, **SIDES}, "Answer like a pirate."),
    "pairs_implicit": (CHATS, ""),
    "pairs_question_key": ({"system": "Be short.", "question": EGG, **SIDES}, "Be short."),
    "pairs_alpaca_pref": ({"instruction": EGG, "input": "", **SIDES}, ""),
    "pairs_sharegpt_pref": (
        {
            "conversations": [{"from": "human", "value": EGG}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        "",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_has_its_prompt_once(name: str, tmp_path: Path) -> None:
    record, system = PAIRS[name]
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(lines(record))
    dataset = prepare_pairs([path], Settings(seq_length=ROOMY, cache_dir=str(tmp_path / "cache")), AGENT_TOKENIZER)
    assert dataset.account["pairs"] == 1
    batch = dataset.batch([0])
    opening = f"<|im_start|><|system|>{system}<|im_end|>" if system else ""
    for start, end, answer in zip(batch.cu_seqlens_D, batch.cu_seqlens_D[1:], (GOOD, BAD), strict=False):
        text = AGENT_TOKENIZER.decode(batch.ids_T[start:end].tolist())
        prompt = f"{opening}<|im_start|><|user|>{EGG}<|im_end|><|im_start|><|assistant|>"
        assert text == f"{prompt}{answer}<|im_end|>"
        own = slice(start, end)
        targets = batch.targets_T[own][batch.weights_T[own] == 1].tolist()
        assert AGENT_TOKENIZER.decode(targets) == f"{answer}<|im_end|>"
