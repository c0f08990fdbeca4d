"""The chat REPL (`lumina chat`): a conversation in the terminal.

`Chat` is the conversation itself and knows no terminal; `converse` reads lines and prints. When prompt and answer no
longer fit the context length, the oldest turns are left out of the prompt, whole turns at a time, and the user is told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from lumina import terminal
from lumina.chat import AnswerDelta, ChatTokenizer, Conversation, Message, ToolCall
from lumina.config import UserError
from lumina.infer.generation.generate import Answer, check_prompt, stream_answer
from lumina.infer.generation.sampling import Sampling
from lumina.infer.records import conversation_of, read_tools, record_of
from lumina.model import Transformer
from lumina.terminal import printable

HELP = """\
/system TEXT   what the model is told before the conversation (no TEXT: nothing)
/reset         forget the conversation
/undo          take back your last message and its answer
/retry         answer the last message again
/tools FILE    tools that the model may call: a JSON list as OpenAI's API has it (no FILE: none)
/tool TEXT     the result of the tool call that waits for one; the answer comes after the last
/thinking on   ask for reasoning before answers; off: for none; nothing: as the template has it
/save FILE     add the conversation to a JSONL file, in the form that `lumina train` reads
/load FILE     go on from the last conversation of a JSONL file
/params        show the settings; /params temperature=0.5 top_k=20 changes them
/stop TEXT     end answers before TEXT; without TEXT nothing but the model ends them
/help          this text
/quit          leave (so does the end of input, Ctrl-D)
End a line with \\ to go on in the next one. Ctrl-C stops an answer."""


@dataclass
class Chat:
    """A conversation with a model: messages without the system's, in order."""

    model: Transformer
    tokenizer: ChatTokenizer
    sampling: Sampling
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    attempt: int = 0  # of the current answer: a retry draws other numbers
    tools: tuple[str, ...] = ()  # JSON texts, as a Conversation's
    thinking: bool | None = None  # whether answers have reasoning; None: the template decides

    def _conversation(self, skipped: int) -> Conversation:
        opening = [Message("system", self.system)] if self.system else []
        return Conversation([*opening, *self.messages[skipped:]], tools=self.tools)

    def prompt(self) -> tuple[list[int], int]:
        """The ids to answer, and how many of the oldest messages had to be left out to leave room for an answer.

        Room is max_length tokens, or half the context length when that is less. Raises UserError when not even the last
        message fits.
        """
        context_length = self.model.config.seq_length
        room = min(self.sampling.max_length, context_length // 2)
        starts = [at for at, message in enumerate(self.messages) if message.role == "user"] or [0]
        for skipped in [0, *(start for start in starts if start > 0)]:
            ids = self.tokenizer.prompt_ids(self._conversation(skipped), self.thinking)
            if len(ids) + room <= context_length:
                return ids, skipped
        check_prompt(len(ids), context_length)
        return ids, skipped

    def answer(self, answer: Answer) -> Iterator[AnswerDelta]:
        """Answer the last message, as it arrives. The answer joins the conversation, also when the caller stops."""
        ids, _ = self.prompt()
        assert self.sampling.seed is not None
        turn = replace(self.sampling, seed=(self.sampling.seed + len(self.messages) + 1000 * self.attempt) % 2**63)
        try:
            yield from stream_answer(self.model, self.tokenizer, ids, turn, answer, self.thinking)
        finally:
            self.messages.append(answer.message())

    def say(self, text: str) -> int:
        """Add a user's message; returns how many old messages its answer will not see.

        Raises UserError, and does not add it, when it does not fit."""
        return self._add(Message("user", text))

    def _add(self, message: Message) -> int:
        self.messages.append(message)
        self.attempt = 0
        try:
            return self.prompt()[1]
        except UserError:
            self.messages.pop()
            raise

    def waiting_calls(self) -> list[ToolCall]:
        """The tool calls of the last answer that have no result yet, in order."""
        at = next((i for i in reversed(range(len(self.messages))) if self.messages[i].role != "tool"), None)
        return [] if at is None else list(self.messages[at].tool_calls[len(self.messages) - at - 1 :])

    def give_result(self, text: str) -> int:
        """Add the result of the next tool call that waits for one; returns as `say`. Raises UserError."""
        waiting = self.waiting_calls()
        if not waiting:
            raise UserError("no tool call waits for a result")
        return self._add(Message("tool", text, name=waiting[0].name, call_id=waiting[0].id))

    def take_back_answer(self) -> None:
        """Forget the last answer. Raises UserError when there is none."""
        if not self.messages or self.messages[-1].role != "assistant":
            raise UserError("there is no answer to take back")
        self.messages.pop()
        self.attempt += 1

    def undo(self) -> None:
        """Forget the last user's message and what followed. Raises UserError when there is none."""
        at = next((i for i in reversed(range(len(self.messages))) if self.messages[i].role == "user"), None)
        if at is None:
            raise UserError("there is nothing to take back")
        del self.messages[at:]

    def save(self, path: Path) -> None:
        """Append the conversation as a line of JSON."""
        try:
            with path.open("ab") as file:
                file.write(orjson.dumps(record_of(self._conversation(0))) + b"\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    def load(self, path: Path) -> None:
        """Take the last conversation of a JSONL file. Raises UserError and changes nothing when it is not one."""
        try:
            lines = [line for line in path.read_bytes().splitlines() if line.strip()]
            conversation = conversation_of(orjson.loads(lines[-1]))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise UserError(f'the last line of {path} is not {{"messages": [{{"role", "content"}}]}}') from None
        messages = list(conversation.messages)
        if any(message.role == "system" for message in messages[1:]):
            raise UserError(f"{path} has a system message inside the conversation")
        opens = bool(messages) and messages[0].role == "system"
        self.system, self.messages = (messages[0].content if opens else None), messages[int(opens) :]
        self.tools = conversation.tools

    def load_tools(self, path: Path | None) -> None:
        """Take tools from a file. Raises UserError, and changes nothing: it holds none, or the template takes none."""
        before, self.tools = self.tools, () if path is None else read_tools(path)
        try:
            self.tokenizer.prompt_ids(Conversation([Message("user", "a")], tools=self.tools))
        except UserError:
            self.tools = before
            raise

    def set_params(self, text: str) -> None:
        """Change settings from `name=value` words. Raises UserError, and changes nothing, when one is wrong."""
        kinds: dict[str, Callable[[str], Any]] = {"temperature": float, "top_k": int, "top_p": float, "min_p": float}
        kinds |= {"repetition_penalty": float, "max_length": int, "seed": int}
        changes = {}
        for word in text.split():
            name, _, value = word.partition("=")
            if name not in kinds:
                raise UserError(f"no setting is called {name}", f"Settings: {', '.join(kinds)}.")
            try:
                changes[name] = kinds[name](value)
            except ValueError:
                raise UserError(f"{name}={value}: {value!r} is not a number") from None
        self.sampling = replace(self.sampling, **changes)


def converse(chat: Chat, about: str, read: Callable[[str], str] = input, console: Console | None = None) -> int:
    """Read lines and answer until the end of input. Returns the exit code."""
    console = console or terminal.console()
    with contextlib.suppress(ImportError):
        import_module("readline")  # gives input() its history and editing
    console.print(f"{about}\n/help lists the commands, /quit leaves.", style="dim", markup=False)
    while True:
        try:
            text = _read(read)
        except EOFError:
            console.print()
            return 0
        except KeyboardInterrupt:
            console.print("\n/quit or Ctrl-D leaves.", style="dim")
            continue
        try:
            if text.startswith("/"):
                if not _command(chat, text, console):
                    return 0
            elif text.strip():
                _reply(chat, chat.say(text), console)
        except UserError as error:
            console.print(f"error: {error}", style="red", markup=False)


def _read(read: Callable[[str], str]) -> str:
    lines = [read("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read("… "))
    return "\n".join(lines)


def _reply(chat: Chat, skipped: int, console: Console) -> None:
    """Answer, without the oldest `skipped` messages."""
    if skipped:
        kept, of = len(chat.messages) - skipped, len(chat.messages)
        console.print(f"The context is full: the answer sees only the last {kept} of {of} messages.", style="yellow")
    _answer(chat, console)


def _answer(chat: Chat, console: Console) -> None:
    answer = Answer()
    deltas = chat.answer(answer)
    thought = False
    try:
        for delta in deltas:
            if delta.reasoning:
                console.print(printable(delta.reasoning), style="dim", end="", markup=False, soft_wrap=True)
            if thought and not delta.reasoning and (delta.content.strip() or delta.tool_calls):
                console.print()  # the answer begins on a line of its own
                thought = False
            thought = thought or bool(delta.reasoning)
            console.file.write(printable(delta.content))
            console.file.flush()
    except KeyboardInterrupt:
        deltas.close()  # type: ignore[attr-defined]
        console.print("\n(stopped)", style="dim")
        return
    console.print()
    for call in answer.tool_calls:
        console.print(f"calls {printable(call.name)}({printable(call.arguments)})", style="cyan", markup=False)
    if answer.tool_calls:
        console.print("/tool TEXT gives the result, in this order.", style="dim")
    if answer.finish != "stop":
        why = f"max_length {chat.sampling.max_length}" if answer.finish == "length" else "the model's context is full"
        console.print(f"(cut off: {why})", style="dim")


def _give_result(chat: Chat, text: str, console: Console) -> None:
    skipped, waiting = chat.give_result(text), chat.waiting_calls()
    if waiting:
        console.print(f"{len(waiting)} more: {printable(waiting[0].name)} is next.", style="dim", markup=False)
    else:
        _reply(chat, skipped, console)


def _set_thinking(chat: Chat, text: str, console: Console) -> None:
    known: dict[str, bool | None] = {"on": True, "off": False, "": None}
    if text not in known:
        raise UserError(f"/thinking takes on, off or nothing, and not {text!r}")
    chat.thinking = known[text]
    console.print("The template decides about reasoning." if not text else f"Reasoning is {text}.", style="dim")


def _command(chat: Chat, text: str, console: Console) -> bool:
    """Do a /command; False when the conversation is over. Raises UserError."""
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    if name in ("/quit", "/exit"):
        return False
    if name == "/help":
        console.print(HELP, markup=False)
    elif name == "/system":
        chat.system = rest or None
        console.print("The model is told this first." if rest else "No system message.", style="dim")
    elif name == "/reset":
        chat.messages.clear()
        console.print("A new conversation.", style="dim")
    elif name == "/undo":
        chat.undo()
        console.print(f"Taken back; {len(chat.messages)} messages remain.", style="dim")
    elif name == "/retry":
        chat.take_back_answer()
        _answer(chat, console)
    elif name == "/tools":
        chat.load_tools(Path(rest).expanduser() if rest else None)
        console.print(f"{len(chat.tools)} tools.", style="dim")
    elif name == "/tool":
        _give_result(chat, rest, console)
    elif name == "/thinking":
        _set_thinking(chat, rest, console)
    elif name in ("/save", "/load"):
        if not rest:
            raise UserError(f"{name} needs a file")
        (chat.save if name == "/save" else chat.load)(Path(rest).expanduser())
        console.print(f"{len(chat.messages)} messages.", style="dim")
    elif name == "/params":
        chat.set_params(rest)
        s = chat.sampling
        settings = f"temperature={s.temperature:g} top_k={s.top_k} top_p={s.top_p:g} max_length={s.max_length}"
        more = f"min_p={s.min_p:g} repetition_penalty={s.repetition_penalty:g}"
        console.print(f"{settings} seed={s.seed} {more}", markup=False)
    elif name == "/stop":
        chat.sampling = replace(chat.sampling, stop=(rest,) if rest else ())
        console.print(f"Answers end before {rest!r}." if rest else "No text ends an answer.", style="dim", markup=False)
    else:
        raise UserError(f"no such command: {name}", "/help lists them.")
    return True
