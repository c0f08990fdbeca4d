"""Conversations as the texts that a chat template makes of them: which samples, and in each what the model is to say.

For an assistant's message k, with the template of Qwen3, which shows the reasoning of the last turn only:

    prompt   ... <|im_start|>assistant\n                            the messages before it, add_generation_prompt
    whole    ... <|im_start|>assistant\n<think>\nR\n</think>\n\nC<|im_end|>\n    the messages up to it
    answer   <think>\nR\n</think>\n\nC<|im_end|>                    what the model is to say: up to its stop token

prompt + answer is what one sample must begin with for the turn to be supervised in it. Where that of an earlier turn is
not a beginning of that of a later one, since the template rewrites history, the conversation becomes several samples.

All texts have the names of special tokens in contents escaped (escaping.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lumina.chat.conversation import Message
from lumina.chat.hf.escaping import EscapingEncoder
from lumina.chat.hf.jinja import JinjaTemplate, RefusalError
from lumina.chat.hf.messages import END_THINK, FORMS, EscapedMessage, MessageForm, leaves

UNPROMPTED = "the chat template does not begin an answer as its generation prompt does"
ENDLESS = "no stop token ends an answer"
FOLDED = "the chat template leaves a message out"
DROPPED = "the chat template leaves out"
SPANS = "spans of its text are masked (train_detail), and the chat template does not show that text once, as it is"
_OPEN_THINK = re.compile(r"<think>\s*$")


class Turn(NamedTuple):
    """One assistant's message. `answer` ends with a stop token; `whole` is the rendering in which it is the last
    message."""

    prompt: str
    answer: str
    whole: str


class Sample(NamedTuple):
    """The text of the first `messages` messages, and of those that are supervised in it the characters [start, end) of
    what the model is to say."""

    text: str
    messages: int
    supervised: dict[int, tuple[int, int]]


class Plan(NamedTuple):
    """The form in which a template is given messages of one shape, and the fields that it leaves out all the same."""

    form: MessageForm = FORMS[0]
    dropped: tuple[str, ...] = ()


class Traits(NamedTuple):
    """What is known of a template: its stop tokens, by id; the name of the one that ends an answer to which the
    template writes none, without tool calls and with; whether asking for reasoning changes a prompt; and the generation
    prompt after a user's message (empty: it is not simply what follows)."""

    stop_ids: frozenset[int]
    content_end: str = ""
    call_end: str = ""
    thinking_known: bool = False
    opening: str = ""


Planner = Callable[[EscapedMessage], Plan]


class Rendering:
    """One conversation's renderings, each made once. Raises RefusalError in what it does."""

    def __init__(
        self,
        template: JinjaTemplate,
        escaping: EscapingEncoder,
        messages: Sequence[EscapedMessage],
        tools: Sequence[Any] | None,
        plan: Planner,
        traits: Traits,
    ) -> None:
        self._template, self._escaping, self._tools = template, escaping, tools
        self.messages, self._traits = messages, traits
        self._plans = [plan(message) if message.role == "assistant" else Plan() for message in messages]
        self._dicts = [message.to_dict(own.form) for message, own in zip(messages, self._plans, strict=True)]
        self._made: dict[tuple[int, bool, bool | None], str] = {}
        self._turns: dict[int, Turn | RefusalError] = {}

    def text(self, count: int, opening: bool, thinking: bool | None = None) -> str:
        """The first `count` messages; with `opening`, and the generation prompt."""
        key = (count, opening, thinking)
        if key not in self._made:
            self._made[key] = self._template.render(self._dicts[:count], opening, self._tools, thinking)
        return self._made[key]

    # --- Turns ---

    def turn(self, at: int) -> Turn:
        """The assistant's message number `at`."""
        if at not in self._turns:
            try:
                self._turns[at] = self._find_turn(at)
            except RefusalError as refusal:
                self._turns[at] = refusal
        found = self._turns[at]
        if isinstance(found, RefusalError):
            raise found
        return found

    def _find_turn(self, at: int) -> Turn:
        """As the template renders it by itself; if that is not what it prompts for, as it does when an answer with or
        without reasoning is asked for."""
        message = self.messages[at]
        options = (None, bool(message.reasoning), not message.reasoning) if self._traits.thinking_known else (None,)
        found = list[Turn]()
        for thinking in options:
            prompt, whole = self.text(at, True, thinking), self.text(at + 1, False, thinking)
            if whole.startswith(prompt) and len(whole) > len(prompt):
                found.append(Turn(prompt, self._ended(whole[len(prompt) :], message), whole))
            else:
                answer = self._after_thinking(prompt, whole, message)
                if answer is None:
                    continue
                found.append(Turn(prompt, self._ended(answer, message), ""))
            if contains(found[-1].answer, message.reasoning):
                return found[-1]
        return found[0] if found else self._after_rewriting(at)

    def _after_thinking(self, prompt: str, whole: str, message: EscapedMessage) -> str | None:
        """Where the generation prompt opens the reasoning and the template leaves out how it ends, as DeepSeek-R1's
        does: the answer with the reasoning, ended. None: it is not of that kind."""
        opened = _OPEN_THINK.search(prompt)
        if opened is None or not whole.startswith(prompt[: opened.start()]):
            return None
        said, reasoning = whole[opened.start() :], message.reasoning
        if not said or "<think>" in said:
            return None
        if not reasoning and "</think>" in message.content:  # the data has it within the content
            reasoning = message.content.rpartition("</think>")[0].partition("<think>")[2].strip("\n")
        return reasoning + END_THINK + said.lstrip("\n")

    def _after_rewriting(self, at: int) -> Turn:
        """Where the answer changes how the template renders what is before it, as a final answer does with gpt-oss's
        earlier reasoning: the context is what the model is asked with, and the answer what follows the same opening."""
        prompt, whole, before = self.text(at, True), self.text(at + 1, False), self.text(at, False)
        opening = prompt[len(before) :] if prompt.startswith(before) else ""
        if not opening.strip() and at:  # nothing begins an answer: it follows what ends the message before it
            asked = self.messages[at - 1].content.strip()
            opening = prompt.rpartition(asked)[2] if asked and asked in prompt else ""
        message = self.messages[at]
        calls = tuple(call._replace(name="q" + call.name) for call in message.calls)
        other = message._replace(content="q" + message.content, reasoning="q" + message.reasoning, calls=calls)
        other = other if message.reasoning else other._replace(reasoning="")
        given = [*self._dicts[:at], other.to_dict(self._plans[at].form)]
        shared = common_prefix(whole, self._template.render(given, False, self._tools))
        start = whole.rfind(opening, 0, shared)
        if not opening.strip() or start < 0:
            raise RefusalError(UNPROMPTED)
        return Turn(prompt, self._ended(whole[start + len(opening) :], message), "")

    def _ended(self, answer: str, message: EscapedMessage) -> str:
        """Up to its first stop token; with the one that generation would stop at where it has none."""
        for token, _, end in self._escaping.find_special(answer):
            if token in self._traits.stop_ids:
                return answer[:end]
        name = self._traits.call_end if message.calls else self._traits.content_end
        if not name:
            raise RefusalError(ENDLESS)
        return answer + name

    # --- Samples ---

    def samples(self, supervised: Sequence[int]) -> list[Sample]:
        """The samples in which the assistant's messages of these numbers are supervised, each once: one sample unless
        the template rewrites history. Messages after the last supervised one are context, if need be in a sample of
        their own."""
        turns = {at: self._checked(at) for at in supervised}
        left, found = list(turns), list[Sample]()
        while left:
            last = left[-1]
            text = turns[last].prompt + turns[last].answer
            own = {}
            for at in left:
                prompt, answer, _ = turns[at]
                if len(prompt) + len(answer) <= len(text) and text.startswith(prompt + answer):
                    own[at] = (len(prompt), len(prompt) + len(answer))
            left = [at for at in left if at not in own]
            whole = turns[last].whole
            found.append(Sample(whole if whole.startswith(text) else text, last + 1, own))
        found.reverse()
        count = len(self.messages)
        if not found or found[-1].messages < count:
            text = self.text(count, False)
            if found and text.startswith(found[-1].text[: max(end for _, end in found[-1].supervised.values())]):
                found[-1] = found[-1]._replace(text=text, messages=count)
            else:
                found.append(Sample(text, count, {}))
        return found

    def _checked(self, at: int) -> Turn:
        """Raises RefusalError, by the field's name, where the template leaves out a part of what is to be said."""
        turn, message, dropped = self.turn(at), self.messages[at], self._plans[at].dropped
        if dropped:
            raise RefusalError(f"{DROPPED} {' and '.join(dropped)}")
        if not contains(turn.answer, message.content):
            raise RefusalError(f"{DROPPED} a part of the content")
        if message.reasoning and not contains(turn.answer, message.reasoning):
            raise RefusalError(f"{DROPPED} a part of the reasoning")
        for call in message.calls:
            if not all(contains(turn.answer, text) for text in (call.name, *leaves(call.arguments))):
                raise RefusalError(f"{DROPPED} a part of a tool call")
        return turn

    def cuts(self, text: str, count: int) -> list[int]:
        """Where in the text of the first `count` messages answers begin, in characters, as far as the template tells.
        They are the same in a prompt and in what is trained on: text is encoded in parts between them."""
        found = []
        for at in range(count):
            if self.messages[at].role == "assistant":
                try:
                    prompt = self.turn(at).prompt
                except RefusalError:
                    continue
                if text.startswith(prompt):
                    found.append(len(prompt))
        return found

    def edges(self, sample: Sample) -> list[int | None]:
        """Where in the text each message ends, in characters; None where the template does not say."""
        found, reached = list[int | None](), 0
        for at in range(sample.messages - 1):
            end = self._escaping.outside_names(sample.text, self._edge(sample, at, reached))
            found.append(end if end > reached else None)
            reached = max(end, reached)
        return [*found, len(sample.text)]

    def _edge(self, sample: Sample, at: int, reached: int) -> int:
        if at in sample.supervised:
            stop = sample.supervised[at][1]
            return max(stop, common_prefix(self.turn(at).whole, sample.text))
        prompt, opening = self._made.get((at + 1, True, None), ""), self._traits.opening
        if opening and self.messages[at].role == "user" and prompt.endswith(opening):  # a rendering less
            return common_prefix(prompt[: -len(opening)], sample.text)
        try:
            end = common_prefix(self.text(at + 1, False), sample.text)
        except RefusalError:
            end = 0  # a template may insist on more turns than a system message
        if self.messages[at].role == "assistant":
            end = max(end, self._answer_edge(sample, at, reached))
        return end

    def _answer_edge(self, sample: Sample, at: int, reached: int) -> int:
        """Where an answer ends that is context and rendered otherwise than when it was the last: with its stop token,
        or where the template has that in the next message, with its content."""
        try:
            limit = common_prefix(self.text(at + 2, False), sample.text)
        except RefusalError:
            return 0
        for token, _, end in self._escaping.find_special(sample.text[:limit], reached):
            if token in self._traits.stop_ids:
                return end
        content = self.messages[at].content.strip()
        place = sample.text.find(content, reached, limit)
        return place + len(content) if place >= 0 else 0

    def masked_spans(self, sample: Sample, at: int, given: Message, character: str) -> list[tuple[int, int]]:
        """Where the masked spans of message `at` stand in the sample, in characters [start, end). `given`: the message
        before escaping by `character`. Raises RefusalError where the template does not show its content once, as it
        is."""
        if not given.masked:
            return []
        escaped, (start, end) = self.messages[at].content, sample.supervised[at]
        content = escaped.strip()  # templates trim
        place = sample.text.find(content, start, end)
        own = [number for number, sign in enumerate(escaped) if sign != character]  # each character's place in escaped
        if place < 0 or sample.text.find(content, place + 1, end) >= 0 or len(own) != len(given.content):
            raise RefusalError(SPANS)
        first, last = place - (len(escaped) - len(escaped.lstrip())), place + len(content)
        moved = [(first + own[begin], first + own[stop - 1] + 1) for begin, stop in given.masked]
        inside = [(max(begin, place), min(stop, last)) for begin, stop in moved]
        return [(begin, stop) for begin, stop in inside if begin < stop]

    def check_context(self, samples: Sequence[Sample]) -> None:
        """Raises RefusalError where a message that is not the assistant's is left out of the texts of all samples."""
        for at, message in enumerate(self.messages):
            texts = (sample.text for sample in reversed(samples) if sample.messages > at)
            if message.role != "assistant" and not any(contains(text, message.content) for text in texts):
                raise RefusalError(f"{FOLDED} or a part of it: {message.role}")


def contains(text: str, part: str) -> bool:
    """Whether a text holds another, as it is, in JSON, or with its words in order (templates trim and quote)."""
    part = part.strip()
    if part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text:
        return True
    place = 0
    for word in _words(part):
        place = text.find(word, place)
        if place < 0:
            return False
        place += len(word)
    return True


def _words(text: str) -> Iterator[str]:
    return (match[0] for match in re.finditer(r"\w+", text))


def common_prefix(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    if second.startswith(first):
        return len(first)
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
