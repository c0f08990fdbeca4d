"""One question and its answer: Alpaca (`instruction`, `input`, `output`, `history`), Dolly (`instruction`, `context`,
`response`), `prompt` with `response` or `completion` (TRL), `question` with `answer`, `query` with calls as `answers`
(xLAM).

What a question is about (`input`, `context`) follows it after a blank line; earlier questions and answers (`history`)
come before it as turns, and their answers are the assistant's words like any other. Reasoning and tool calls beside an
answer that is a text are the answer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lumina.chat import Conversation, Message
from lumina.data.records.calls import CALLS, TOOLS, from_json
from lumina.data.records.chats import decoded
from lumina.data.records.fault import EMPTY, TWICE, WRONG_TYPE, Fault, kind
from lumina.data.records.fields import NOT_USED, FieldTally, Vocabulary, is_empty, one_of
from lumina.data.records.parts import REASONING
from lumina.data.records.turns import SYSTEMS, to_conversation, to_messages

ABOUT = ("input", "context")
ANSWERS = ("output", "response", "completion", "answer")
QUESTIONS = ("instruction", "prompt", "question", "query")
_USED = frozenset({*QUESTIONS, *ABOUT, *ANSWERS, *SYSTEMS, "history", *TOOLS, *CALLS, *REASONING})
RECORD = Vocabulary("question and answer", _USED)
WITH_CALLS = Vocabulary("question and calls", _USED | {"answers"})
_BESIDE = frozenset({*CALLS, *REASONING})


def has_answer(record: dict[str, Any]) -> bool:
    return any(record.get(name) is not None for name in ANSWERS) or (
        any(not is_empty(record.get(name)) for name in CALLS) or _call_answers(record)
    )


def _call_answers(record: dict[str, Any]) -> bool:
    """Whether `answers` is the answer, a list of tool calls (xLAM)."""
    if record.get("answers") is None or any(not is_empty(record.get(name)) for name in (*ANSWERS, *CALLS)):
        return False
    calls = from_json(record["answers"])
    if type(calls) is not list or not calls:
        return False
    return all(type(call) is dict and not {"name", "function"}.isdisjoint(call) for call in map(from_json, calls))


def from_instruction(record: dict[str, Any], tally: FieldTally) -> Conversation | Fault:
    """A record with one of QUESTIONS. A prompt that is a list of messages is answered by a list, or by a text."""
    question, answer = one_of(record, QUESTIONS), one_of(record, ANSWERS)
    if question[1] or answer[1]:
        return Fault(TWICE, f"{'questions' if question[1] else 'answers'} in several fields differ", 2)
    assert question[0] is not None
    reply = None if answer[0] is None else decoded(record[answer[0]])
    if isinstance(reply, Fault):
        return reply
    spoken = {"role": "assistant"} if answer[0] is None else {"role": "assistant", "content": reply}
    replies = reply if type(reply) is list else [spoken]
    vocabulary = RECORD
    if not _BESIDE.isdisjoint(record) or (answer[0] is None and "answers" in record):
        beside = {name: record[name] for name in (*CALLS, *REASONING) if not is_empty(record.get(name))}
        if _call_answers(record):
            vocabulary, beside["tool_calls"] = WITH_CALLS, record["answers"]
        if beside and type(reply) is list:
            name = next(iter(beside))
            return Fault(f"{NOT_USED}: {name}", f"`{name}` beside an answer in messages has no place", len(reply) + 1)
        replies = reply if type(reply) is list else [{**spoken, **beside}]
    asked = prompt_messages(record, tally)
    if isinstance(asked, Fault):
        return asked
    said = to_messages(replies, tally)
    if isinstance(said, Fault):
        return said
    if not said:
        return Fault(EMPTY, "no answer", len(asked) + 1)
    return to_conversation(record, [*asked, *said], tally, vocabulary)


def prompt_messages(record: dict[str, Any], tally: FieldTally) -> list[Message] | Fault:
    """What a record asks: its history and question."""
    name, _ = one_of(record, QUESTIONS)
    assert name is not None
    question = decoded(record[name])
    if isinstance(question, Fault):
        return question
    about, differs = one_of(record, ABOUT)
    if differs:
        return Fault(TWICE, "`input` and `context` differ", 2)
    if type(question) is str and about is None and question and not question.isspace():
        messages: list[Message] | Fault = [Message("user", question)]
    elif type(question) is list:
        messages = to_messages(question, tally)
        if about is not None and record[about]:
            return Fault(f"field not used: {about}", f"`{about}` beside a list of messages has no place", len(question))
    else:
        parts = [question] if about is None else [question, record[about]]
        wrong = next((part for part in parts if type(part) is not str), None)
        if any(type(part) is not str for part in parts):
            return Fault(WRONG_TYPE, f"the question is {kind(wrong)}", 2)
        text = "\n\n".join(part for part in parts if part.strip())
        messages = to_messages([{"role": "user", "content": text}], tally)
    if isinstance(messages, Fault):
        return messages
    if record.get("history") is None:
        return messages
    earlier = _history(record["history"], tally)
    return earlier if isinstance(earlier, Fault) else [*earlier, *messages]


def _history(history: Any, tally: FieldTally) -> list[Message] | Fault:
    """`[[question, answer], …]`, or messages."""
    history = decoded(history)
    if isinstance(history, Fault):
        return history
    if is_empty(history):
        return []
    if type(history) is not list:
        return Fault(WRONG_TYPE, f"`history` is {kind(history)}, not a list")
    turns: list[Any] = []
    for part in history:
        if type(part) is list and len(part) == 2:
            turns += [{"role": "user", "content": part[0]}, {"role": "assistant", "content": part[1]}]
        else:
            turns.append(part)
    return to_messages(turns, tally)


def answer_messages(value: Any, tally: FieldTally) -> list[Message] | Fault:
    """An answer: a text, a message, or messages."""
    turns: Sequence[Any]
    value = decoded(value)
    if isinstance(value, Fault):
        return value
    if type(value) is str:
        turns = [{"role": "assistant", "content": value}]
    else:
        turns = [value] if type(value) is dict else value
    if type(turns) is not list:
        return Fault(WRONG_TYPE, f"an answer is {kind(value)}")
    return to_messages(turns, tally)
