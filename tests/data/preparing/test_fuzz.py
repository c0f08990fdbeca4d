"""Mutated lines: nothing crashes, nothing hangs, and every line is in the account."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path

import orjson
import pytest

from lumina.config import UserError
from lumina.data import prepare
from lumina.data.account import Account
from lumina.data.converting.fixing import write_fixed
from lumina.data.reading.items import read_items
from lumina.data.reading.layout import detect
from lumina.data.reading.streams import READ_BYTES
from lumina.data.records.fault import BAD_ARGUMENTS, BAD_CALL, BAD_TOOL, OUT_OF_ORDER
from lumina.data.reports.validation import validate
from tests.data.helpers import AGENT_TOKENIZER, TOKENIZER, Settings, chat, write_jsonl

LINES = 113_000  # more than 100,000 of them mutated
ASKED, SAID = [{"role": "user", "content": "q"}], {"role": "assistant", "content": "a"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "漢"}'}}
CALLED, AS_TEXT = '{"name": "f", "arguments": {"a": [1]}}', '[{"name": "f"}]'
RESULT = {"role": "tool", "tool_call_id": "c", "content": "r"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
CORPUS = [
    orjson.dumps(chat("hello there", "general reply", "and?", "more")),
    orjson.dumps({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "é漢🙂"}]}),
    orjson.dumps({"instruction": "do", "input": "this", "output": "done"}),
    orjson.dumps({"prompt": "q", "response": "a"}),
    orjson.dumps({"text": "plain <|im_end|> words"}),
    orjson.dumps({"prompt": {"role": "prompter", "text": "q", "replies": [{"role": "assistant", "text": "a"}]}}),
    orjson.dumps({"messages": [*ASKED, {**SAID, "tool_calls": [CALL]}, RESULT, SAID], "tools": [TOOL]}),
    orjson.dumps({"conversations": [*ASKED, {"from": "function_call", "value": CALLED},
                                    {"from": "observation", "value": {"t": 4}}, SAID], "tools": AS_TEXT}),
    orjson.dumps({"messages": [*ASKED, {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "look"},
        {"type": "tool_use", "id": "c", "name": "f", "input": {"a": {"b": []}}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "r"}]}, SAID]}),
    orjson.dumps({"messages": [*ASKED, {**SAID, "reasoning_content": "because", "function_call": {"name": "f"}}]}),
    orjson.dumps({"query": "q", "tools": [TOOL["function"]], "answers": '[{"name": "f", "arguments": {}}]'}),
    orjson.dumps({"question": "q", "thinking": "so", "answer": "a"}),
]  # fmt: skip
CONTAINERS = [b"[%s, %s]", b'{"data": [%s, %s]}', b"%s %s", b"[[%s], %s]", b'"%s%s"']  # of two lines
FRAGMENTS = [
    *(b"NaN", b"Infinity", b"-1e999", b"null", b"true", b"[]", b"{}", b'""', b"\\ud800", b"\\u0000", b"\xff\xfe"),
    *(b"\xed\xa0\x80", b'"role":"user",', b'"messages":[],', b"<|im_start|>", b"\r", b"\x00", b"\xe2\x80\xa8"),
    *(b"\\", b'"', b"[[[[", b"}}}}", b'"tools":[{}],', b'"reasoning":["r"],', b'"function_call":"f(x)",'),
    *(
        b'"tool_calls":[{"name":"f","arguments":"{"}],',
        b'"role":"tool",',
        b'"arguments":{},',
        b'"weight":0,',
        b'{"type":"tool_use"},',
    ),
]


def mutated(rng: random.Random) -> bytes:
    line = bytearray(rng.choice(CORPUS))
    if rng.random() < 0.1:
        line = bytearray(rng.choice(CONTAINERS) % (rng.choice(CORPUS), bytes(line)))
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(line) + 1)
        what = rng.randrange(6)
        if what == 0 and line:
            line[at % len(line)] ^= 1 << rng.randrange(8)
        elif what == 1:
            del line[at:]
        elif what == 2:
            line[at:at] = rng.choice(FRAGMENTS)
        elif what == 3:
            end = rng.randrange(at, len(line) + 1)
            line[at:at] = line[at:end]  # duplicated keys and values among them
        elif what == 4:
            line[at:at] = rng.choice([b"[", b'{"a":']) * rng.choice([3, 300, 3000])
        else:
            del line[at : at + rng.randint(1, 9)]
    return bytes(line).replace(b"\n", b" ")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(20_240_601)
    lines = [mutated(rng) for _ in range(LINES)]
    beginning = 2 * READ_BYTES // len(CORPUS[0])  # by which it is told that these are lines
    lines[:beginning] = [CORPUS[0]] * beginning
    lines[15_000] = orjson.dumps(chat("x" * 3_000_000, " " * 1_000_000 + "end"))  # huge
    lines[16_000] = b'{"messages": ' + b"[" * 1_000_000
    return write_jsonl(tmp_path_factory.mktemp("fuzz") / "fuzz.jsonl", lines)


def test_every_mutated_line_is_accounted_for(fuzzed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumina.data.preparing.pool.BYTES_PER_WORKER", 1)
    account = Account.from_dict(prepare([fuzzed], Settings(seq_length=512), TOKENIZER, workers=2).account)
    account.check()
    # A line may hold an array of records: each is counted, and no line is skipped.
    numbers = [item.number for item in read_items(str(fuzzed), detect(str(fuzzed)))]
    assert account.lines == len(numbers)
    assert sorted(set(numbers)) == list(range(1, LINES + 1))
    assert account.conversations > LINES // 10, "mutations should leave some lines sound"
    assert account.bad_lines > LINES // 10
    reasons = {reason for reason in account.faults if not reason.startswith("field not used: ")}
    assert reasons - {"two fields for one thing", "a Python literal, not JSON", OUT_OF_ORDER} == {
        "broken JSON", "wrong type", "empty", "unknown role", "no assistant turn", "unknown format",
        BAD_TOOL, BAD_CALL, BAD_ARGUMENTS,
    }  # fmt: skip


def test_validation_sees_what_training_sees_and_fix_leaves_only_sound_lines(fuzzed: Path, tmp_path: Path) -> None:
    dataset = prepare([fuzzed], Settings(seq_length=512), TOKENIZER, workers=2)
    validation = validate([str(fuzzed)], TOKENIZER, workers=2)
    for name in ("lines", "records", "conversations", "messages", "tokens"):
        assert getattr(validation.account, name) == dataset.account[name]
    assert validation.account.tokens_supervised == dataset.account["tokens_trained"]
    written, rejected, rejects = write_fixed([str(fuzzed)], tmp_path / "sound.jsonl")
    assert written == validation.account.conversations
    assert rejected == validation.account.bad_lines
    assert len(rejects.read_bytes().splitlines()) == rejected
    again = validate([str(tmp_path / "sound.jsonl")], TOKENIZER, workers=1)
    assert again.account.bad_lines == 0
    assert again.account.tokens_supervised == validation.account.tokens_supervised
    assert sorted(again.statistics.hashes) == sorted(validation.statistics.hashes)


def test_arrays_of_garbage_end(tmp_path: Path) -> None:
    rng = random.Random(7)
    path = tmp_path / "array.json"
    for _ in range(300):
        good = [orjson.dumps(chat("q", "a"))] * rng.randint(0, 3)
        path.write_bytes(b"[" + b",".join([*good, mutated(rng), *good]) + rng.choice([b"]", b"", b"}"]))
        usable = validate([str(path)], AGENT_TOKENIZER, workers=1).account.conversations
        with nullcontext() if usable else pytest.raises(UserError, match="no usable conversation"):
            Account.from_dict(prepare([path], Settings(), AGENT_TOKENIZER, workers=1).account).check()
