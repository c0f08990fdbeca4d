"""Preference pairs: `chosen` and `rejected`, each a text, a message or messages, after one prompt.

The prompt is `prompt`, `instruction` (with `input`, `history`) or `question`, a text or messages, or `conversations`; a
`system` comes before it, and both sides have the same tools. Where the sides are whole chats, the prompt is what both
begin with.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from lumina.chat import Conversation, Message
from lumina.data.formats.sharegpt import KEYS
from lumina.data.records.calls import TOOLS, same_calls
from lumina.data.records.chats import decoded
from lumina.data.records.fault import EMPTY, TWICE, WRONG_TYPE, Fault, kind
from lumina.data.records.fields import FieldTally, Vocabulary, one_of
from lumina.data.records.questions import ABOUT, QUESTIONS, answer_messages, prompt_messages
from lumina.data.records.turns import ROLES, SYSTEMS, declared_tools, group_id, system_message, to_messages

SAME, NO_PAIR = "chosen and rejected are the same", "no prompt, chosen and rejected"
OTHER_PROMPT = "chosen and rejected answer different prompts"
PROMPT_TWICE = "chosen and rejected begin with the prompt's text"
_ECHO = 20  # characters of a prompt that two answers do not begin with by chance
_OPENAI = ("preferred_output", "non_preferred_output")
_CHATS = (*KEYS, "messages")
_USED = frozenset({"chosen", "rejected", *SYSTEMS, *TOOLS})
# By where the prompt stands: what is not read then has to repeat what is.
_ASKED = Vocabulary("a preference pair", _USED | {"history", *QUESTIONS, *ABOUT})
_RECORDS = {name: Vocabulary("a preference pair", _USED | {name}) for name in ("", *_CHATS)}


class Pair(NamedTuple):
    """Two conversations that begin with the same prompt, whose messages are masked."""

    chosen: Conversation
    rejected: Conversation


def from_pair(record: Any, tally: FieldTally | None = None) -> Pair | Fault:
    """A parsed record, or why it cannot be used."""
    tally = FieldTally() if tally is None else tally
    try:
        return _pair(record, tally)
    except RecursionError:
        return Fault(WRONG_TYPE, "nested too deep")


def _pair(record: Any, tally: FieldTally) -> Pair | Fault:
    if isinstance(record, Fault):
        return record
    record = _from_openai(record)
    if type(record) is not dict or any(record.get(key) is None for key in ("chosen", "rejected")):
        return Fault(NO_PAIR, "a pair has the keys chosen and rejected")
    sides, declared = [], []
    for key in ("chosen", "rejected"):
        tally.tools.clear()
        side = answer_messages(record[key], tally)
        if isinstance(side, Fault):
            return Fault(side.reason, f"{key}: {side.detail}")
        if not side:
            return Fault(EMPTY, f"{key}: no answer")
        sides.append(side)
        declared.append(list(tally.tools))
    if declared[0] != declared[1]:
        return Fault(OTHER_PROMPT, "the system messages of the sides declare different tools")
    prompt = _prompt(record, tally)
    if isinstance(prompt, Fault):
        return prompt
    answers = _without(prompt, sides) if prompt is not None else None
    if prompt is None:  # implicit: what both sides begin with, but for the answers
        alike = sum(1 for _ in takewhile(lambda pair: _alike(*pair), zip(*sides, strict=False)))
        count = min(alike, *(len(side) - 1 for side in sides))
        prompt, answers = sides[0][:count], [side[count:] for side in sides]
        other = sides[1][:count]  # whose calls may have other ids
        opening = system_message(record, prompt, tally)
        if isinstance(opening, Fault):
            return opening
        prompt, other = [*opening, *prompt], [*opening, *other]
    else:
        other = prompt
    if answers is None or any(answer[0].role != "assistant" for answer in answers if answer):
        return Fault(OTHER_PROMPT, "the sides are whole chats that do not begin alike")
    if not prompt:
        return Fault(NO_PAIR, "no prompt, and the sides do not begin with one")
    if any(not answer or answer[-1].role != "assistant" for answer in answers):
        return Fault(WRONG_TYPE, "chosen and rejected must end with the assistant's answer")
    if all(_repeats_prompt(answer[0].content, prompt) for answer in answers):
        return Fault(PROMPT_TWICE, "both texts begin with the prompt's: leave it out of them")
    if len(answers[0]) == len(answers[1]) and all(map(_alike, *answers)):
        return Fault(SAME, "the two answers are the same")
    vocabulary = _RECORDS.get(_source(record) or "", _ASKED)
    fault = tally.count(vocabulary, record, [*prompt, *answers[0], *answers[1]])
    if fault is not None:
        return fault
    tools = declared_tools(record, tally)
    if isinstance(tools, Fault):
        return tools
    chosen, rejected = (
        Conversation(
            [*(message._replace(supervise=False) for message in asked), *answer], group_id(record), tools=tools
        )
        for asked, answer in zip((prompt, other), answers, strict=True)
    )
    return Pair(chosen, rejected)


def _from_openai(record: Any) -> Any:
    """`{"input": {"messages", "tools"?}, "preferred_output", "non_preferred_output"}`, the form of OpenAI's preference
    fine-tuning, under the names that we read; anything else as it is."""
    if type(record) is not dict or any(record.get(name) is None for name in _OPENAI):
        return record
    asked = record.get("input")
    rest = {name: held for name, held in record.items() if name not in ("input", *_OPENAI)}
    if type(asked) is not dict or not {"chosen", "rejected", *asked}.isdisjoint(rest):
        return record
    return {**rest, **asked, "chosen": record[_OPENAI[0]], "rejected": record[_OPENAI[1]]}


def _repeats_prompt(answer: str, prompt: Sequence[Message]) -> bool:
    """Whether an answer's text begins with that of the prompt's last message."""
    asked = prompt[-1].content.strip()
    return len(asked) >= _ECHO and answer.lstrip().startswith(asked)


def _alike(one: Message, other: Message) -> bool:
    """Whether two messages say the same, whatever the ids of their calls are and how arguments are written."""
    if one == other:
        return True
    bare = [message._replace(tool_calls=(), call_id="") for message in (one, other)]
    return bare[0] == bare[1] and same_calls(one.tool_calls, other.tool_calls)


def _source(record: dict[str, Any]) -> str | None:
    """The field that states the prompt. A chat that ends with an answer is none: datasets keep the chosen one so."""
    name, _ = one_of(record, QUESTIONS)
    if name is not None:
        return name
    for name in _CHATS:
        chat = decoded(record.get(name))
        last = chat[-1] if type(chat) is list and chat else None
        role = last.get("role", last.get("from")) if type(last) is dict else None
        if chat is not None and ROLES.get(str(role).lower()) != "assistant":
            return name
    return None


def _prompt(record: dict[str, Any], tally: FieldTally) -> list[Message] | Fault | None:
    """The prompt that a record states, its system message included; None when it states none."""
    name = _source(record)
    if name is None:
        return None
    if name in QUESTIONS:
        if one_of(record, QUESTIONS)[1]:
            return Fault(TWICE, "its prompt stands in two fields that differ")
        messages = prompt_messages(record, tally)
    else:
        chat = decoded(record[name])
        if type(chat) is not list:
            wrong = f"`{name}` is {kind(record[name])}, not a list"
            return chat if isinstance(chat, Fault) else Fault(WRONG_TYPE, wrong)
        messages = to_messages(chat, tally)
    if isinstance(messages, Fault):
        return messages
    opening = system_message(record, messages, tally)
    return opening if isinstance(opening, Fault) else [*opening, *messages]


def _without(prompt: Sequence[Message], sides: Sequence[list[Message]]) -> list[list[Message]] | None:
    """The sides without the prompt that they may repeat, with or without its system message; None when a side begins
    with another one."""
    answers = []
    turns = [message for message in prompt if message.role != "system"]
    for side in sides:
        if side and side[0].role == "assistant" and (not turns or turns[0].role != "assistant"):
            answers.append(side)
            continue
        start = next((start for start in (list(prompt), turns) if side[: len(start)] == start), None)
        if start is None:
            return None
        answers.append(side[len(start) :])
    return answers
