"""What a chat template does with the fields of a message, found by rendering conversations of unmistakable words.

No list of models is kept: which form of a message a template takes, what it leaves out, and what ends an answer, all
follow from what it renders.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from lumina.chat.hf.escaping import EscapingEncoder
from lumina.chat.hf.jinja import JinjaTemplate, RefusalError
from lumina.chat.hf.messages import FORMS, EscapedCall, EscapedMessage, MessageForm
from lumina.chat.hf.rendering import DROPPED, FOLDED, Plan, Rendering, Traits, Turn

CONTENT, REASONING, TOOL = "qcontentq", "qreasoningq", "qtoolq"
NAMES, KEYS, VALUES = (tuple(f"q{what}{i}q" for i in range(2)) for what in ("name", "key", "value"))
USER = EscapedMessage("user", "quserq", "", (), "", "")
PROBE_TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "qdescriptionq",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": "qdescriptionq"}},
                "required": [key],
            },
        },
    }
    for name, key in zip(NAMES, KEYS, strict=True)
]
_MOST_SHAPES = 8192  # kept; a shape more costs a rendering


def probe_call(number: int) -> EscapedCall:
    key, value = KEYS[number], VALUES[number]
    return EscapedCall(f"{number:09d}", NAMES[number], {key: value}, f'{{"{key}": "{value}"}}')


def probe_answer(content: bool = True, reasoning: bool = False, calls: int = 0) -> EscapedMessage:
    """An assistant's message of unmistakable words."""
    own = tuple(map(probe_call, range(calls)))
    return EscapedMessage("assistant", CONTENT if content else "", REASONING if reasoning else "", own, "", "")


def probe_result(number: int = 0) -> EscapedMessage:
    return EscapedMessage("tool", f"{TOOL}{number}", "", (), NAMES[number], f"{number:09d}")


class ChatTemplate:
    """A chat template, what ends its answers, and the form in which it takes messages."""

    def __init__(
        self, template: JinjaTemplate, escaping: EscapingEncoder, stop_ids: frozenset[int], end_id: int | None
    ) -> None:
        """`stop_ids`: those that are known; `end_id`: the one that the vocabulary names."""
        self._template, self._escaping = template, escaping
        self._plans: dict[tuple[bool, bool, int], Plan] = {}
        self._shapes: dict[tuple[Any, ...], str] = {}
        names = {token: name for name, token in escaping.special_ids.items()}
        end = names.get(min(stop_ids) if end_id is None or end_id not in stop_ids else end_id, "")
        self._traits = Traits(stop_ids, end, end, self._knows_thinking())
        self._traits = self._traits._replace(stop_ids=stop_ids | self._answer_end(), opening=self._find_opening())
        self._traits = self._traits._replace(stop_ids=self.stop_ids | self._call_end())
        self._traits = self._traits._replace(
            content_end=self._following((probe_answer(), USER)) or end,
            call_end=self._following((probe_answer(False, False, 1), probe_result())) or end,
        )
        self._plans.clear()  # they were made before the stop tokens were known

    @property
    def stop_ids(self) -> frozenset[int]:
        return self._traits.stop_ids

    def rendering(
        self, messages: Sequence[EscapedMessage], tools: Sequence[Any] | None, form: MessageForm | None = None
    ) -> Rendering:
        """`form`: of all messages; None takes the one in which the template leaves nothing out."""

        def fixed(_: EscapedMessage) -> Plan:
            assert form is not None
            return Plan(form)

        plan = self.plan if form is None else fixed
        return Rendering(self._template, self._escaping, messages, tools, plan, self._traits)

    # --- Fields ---

    def plan(self, message: EscapedMessage) -> Plan:
        """In which form the template takes an assistant's message of this shape."""
        shape = (bool(message.content.strip()), bool(message.reasoning), min(len(message.calls), 2))
        if shape not in self._plans:
            self._plans[shape] = self._find_plan(*shape)
        return self._plans[shape]

    def _find_plan(self, content: bool, reasoning: bool, calls: int) -> Plan:
        if not reasoning and not calls:
            return Plan()
        probe, found = probe_answer(content, reasoning, calls), list[Plan]()
        for form in FORMS:
            if (form.inline and not reasoning) or (form.absent and (content or not calls)) or (form.text and not calls):
                continue
            try:
                turn = self.rendering([USER, probe], PROBE_TOOLS if calls else None, form).turn(1)
            except RefusalError:
                continue
            found.append(Plan(form, tuple(_missing(turn.answer, probe))))
            if not found[-1].dropped:
                break
        return min(found, key=lambda plan: len(plan.dropped), default=Plan())

    @cached_property
    def takes_tools(self) -> bool:
        try:
            return NAMES[0] in self.rendering([USER], PROBE_TOOLS).text(1, True)
        except RefusalError:
            return True  # what it refuses, it says itself

    @cached_property
    def nine_ids(self) -> bool:
        """Whether the template refuses an id of a call that has not nine characters, as Mistral's do."""
        call, result = probe_call(0), probe_result()
        taken = []
        for own in (call.id, "call_0"):
            answer = probe_answer(False)._replace(calls=(call._replace(id=own),))
            try:
                self.rendering([USER, answer, result._replace(call_id=own)], PROBE_TOOLS).text(3, False)
            except RefusalError:
                taken.append(False)
            else:
                taken.append(True)
        return taken == [True, False]

    def check_shape(self, messages: Sequence[EscapedMessage], tools: Sequence[Any] | None) -> None:
        """Raises RefusalError, by what it leaves out, where the template leaves out the tools or the whole of another's
        message than the assistant's: the template is asked with unmistakable words, once for conversations alike."""
        if tools and not self.takes_tools:
            raise RefusalError(f"{DROPPED} the tools")
        key = (bool(tools), *((m.role, bool(m.content), bool(m.reasoning), len(m.calls)) for m in messages))
        if key not in self._shapes:
            if len(self._shapes) >= _MOST_SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._left_out(messages, tools)
        if self._shapes[key]:
            raise RefusalError(self._shapes[key])

    def _left_out(self, messages: Sequence[EscapedMessage], tools: Sequence[Any] | None) -> str:
        probes = []
        for at, message in enumerate(messages):
            content = f"qmessage{at}q" if message.content else ""
            calls = tuple(probe_call(i % 2)._replace(id=call.id) for i, call in enumerate(message.calls))
            reasoning = REASONING if message.reasoning else ""
            name = NAMES[0] if message.role == "tool" else ""
            probes.append(EscapedMessage(message.role, content, reasoning, calls, name, message.call_id))
        rendering = self.rendering(probes, PROBE_TOOLS if tools else None)
        answers = [at for at, message in enumerate(probes) if message.role == "assistant"]
        try:  # what a template renders only before an answer that is to come, the answer's own sample has
            text = rendering.text(len(probes), False) + "".join(rendering.text(at, True) for at in answers[-1:])
        except RefusalError:
            return ""  # what it refuses, it says itself
        gone = (m.role for m in probes if m.role != "assistant" and m.content not in text)
        role = next(gone, None)
        return "" if role is None else f"{FOLDED}: {role}"

    # --- Reasoning, stop tokens ---

    def _knows_thinking(self) -> bool:
        """Whether enable_thinking or thinking changes the generation prompt, or what is before it."""
        try:
            asked = {self._template.render([USER.to_dict(FORMS[0])], True, None, t) for t in (None, True, False)}
        except RefusalError:
            return False
        return len(asked) > 1

    def _find_opening(self) -> str:
        """The generation prompt after a user's message, if it is the same after the first and the second."""
        found = set()
        for messages in ([USER], [USER, probe_answer(), USER]):
            try:
                rendering = self.rendering(messages, None)
                texts = [rendering.text(len(messages), opening) for opening in (False, True)]
            except RefusalError:
                return ""
            found.add(texts[1].removeprefix(texts[0]) if texts[1].startswith(texts[0]) else "")
        return found.pop() if len(found) == 1 else ""

    def _specials(self, text: str) -> list[int]:
        return [token for token, _, _ in self._escaping.find_special(text)]

    def _answer_end(self) -> frozenset[int]:
        """The special token that the template writes after an answer. Base models' files often name another one, since
        they end documents and not turns."""
        if self.stop_ids.intersection(self._between((probe_answer(), USER), CONTENT)):
            return frozenset()
        return self.first_after_answer

    @cached_property
    def first_after_answer(self) -> frozenset[int]:
        """The first special token after the content of an answer that is the last message."""
        try:
            text = self.rendering([USER, probe_answer()], None).text(2, False)
        except RefusalError:
            return frozenset()
        return frozenset(self._specials(text.partition(CONTENT)[2])[:1])

    def _call_end(self) -> frozenset[int]:
        """The special token that the template writes after the last tool call of an answer, if none that is known is
        there: the last one, which is not written after each call."""
        found = list[list[int]]()
        for calls in (1, 2):
            try:
                turn = self.rendering([USER, probe_answer(False, False, calls)], PROBE_TOOLS).turn(1)
            except RefusalError:
                continue
            if _missing(turn.answer, probe_answer(False, False, calls)) or not turn.whole:
                continue
            said = turn.whole[len(turn.prompt) :].rstrip()
            found.append(self._specials(said))
            if self.stop_ids.intersection(found[-1]):
                return frozenset()
            if not any(end == len(said) for _, _, end in self._escaping.find_special(said)):
                return frozenset()
        if not found or any(own.count(own[-1]) > 1 for own in found):
            return frozenset()
        return frozenset(own[-1] for own in found)

    def _between(self, follow: Sequence[EscapedMessage], last: str) -> list[int]:
        """The special tokens between an answer, of which `last` is the end, and what is in the next message."""
        tools = PROBE_TOOLS if follow[0].calls else None
        try:
            text = self.rendering([USER, *follow], tools).text(3, False)
        except RefusalError:
            return []
        own = text.partition(USER.content)[2]
        return self._specials(own[own.find(last) : max(own.find(follow[1].content), 0)])

    def _following(self, follow: tuple[EscapedMessage, EscapedMessage]) -> str:
        """The name of the stop token that the template writes between an answer and the next message."""
        names = {token: name for name, token in self._escaping.special_ids.items()}
        between = self._between(follow, VALUES[0] if follow[0].calls else CONTENT)
        return next((names[token] for token in between if token in self.stop_ids), "")

    # --- What the model says ---

    def probe_turn(self, answer: EscapedMessage, checked: bool = True) -> Turn | None:
        """The turn of this answer to a question; None where the template refuses it or (`checked`) drops a part."""
        try:
            turn = self.rendering([USER, answer], PROBE_TOOLS if answer.calls else None).turn(1)
        except RefusalError:
            return None
        return None if checked and _missing(turn.answer, answer) else turn

    def without_stop(self, answer: str) -> str:
        """An answer up to its stop token."""
        stops = (start for token, start, _ in self._escaping.find_special(answer) if token in self.stop_ids)
        return answer[: next(stops, len(answer))]

    @cached_property
    def spoken_ids(self) -> frozenset[int]:
        """The special tokens of answers, those around reasoning and tool calls among them."""
        found = set(self.stop_ids)
        for content, reasoning, calls in [(1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 1)]:
            turn = self.probe_turn(probe_answer(bool(content), bool(reasoning), calls))
            if turn is not None:
                found.update(self._specials(turn.answer))
        return frozenset(found)


def _missing(answer: str, probe: EscapedMessage) -> Iterable[str]:
    """The fields of a probe that an answer does not have."""
    found = []
    if probe.content and probe.content not in answer:
        beside = " beside tool calls" if probe.calls else " beside reasoning" if probe.reasoning else ""
        found.append(f"the content{beside}")
    place, others = answer.find(probe.reasoning), [probe.content, *(call.name for call in probe.calls)]
    if probe.reasoning and not 0 <= place < min(
        (answer.find(own) for own in others if own and own in answer), default=1 + place
    ):
        found.append("the reasoning" + (" beside tool calls" if probe.calls else ""))
    lost = [
        call
        for call in probe.calls
        if not all(text in answer for text in (call.name, *call.arguments, *map(str, call.arguments.values())))
    ]
    if lost:
        found.append("the tool calls" if len(lost) == len(probe.calls) else "all tool calls of a turn but one")
    return found
