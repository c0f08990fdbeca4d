"""The conversation in the terminal: what the model sees, what the commands do, what is printed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from lumina.chat import AnswerDelta, Conversation, Message, Tokenizer
from lumina.cli import main
from lumina.config import UserError
from lumina.infer import Sampling
from lumina.infer.generation.generate import Answer
from lumina.infer.repl import Chat, converse
from lumina.terminal import printable
from tests.infer.small_models import make_model, write_run
from tests.infer.taught_models import ANSWER, ASKED, CONVERSATIONS, REASONING, WEATHER, taught_model

TOKENIZER = Tokenizer.load()
USER, BOT = "user", "assistant"


@pytest.fixture
def chat() -> Chat:
    return Chat(make_model(num_layers=1), TOKENIZER, Sampling(1.0, max_length=6, seed=1))


def spoken(chat: Chat, lines: list[str]) -> str:
    """What the terminal shows when a user types these lines and then ends the input."""
    typed = iter(lines)

    def read(_: str) -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    out = io.StringIO()
    assert converse(chat, "about", read, Console(file=out, width=200)) == 0
    return out.getvalue()


def test_each_answer_sees_the_whole_conversation(chat: Chat) -> None:
    chat.system = "Be kind."
    shown = spoken(chat, ["Hello", "line one\\", "line two"])
    assert [message.role for message in chat.messages] == [USER, BOT, USER, BOT]
    assert chat.messages[2].content == "line one\nline two"
    assert all(
        message.content and printable(message.content) in shown for message in chat.messages if message.role == BOT
    )
    whole = Conversation([Message("system", "Be kind."), *chat.messages])
    assert chat.prompt() == (TOKENIZER.prompt_ids(whole), 0)
    assert "(cut off: max_length 6)" in shown


def test_a_full_context_leaves_out_whole_oldest_turns_and_says_so(chat: Chat) -> None:
    chat.system = "S"
    words = "word " * 20
    shown = spoken(chat, [words] * 6)
    assert "The context is full: the answer sees only the last" in shown
    ids, skipped = chat.prompt()
    assert skipped % 2 == 0
    assert skipped > 0
    kept = Conversation([Message("system", "S"), *chat.messages[skipped:]])
    assert ids == TOKENIZER.prompt_ids(kept)
    assert len(ids) + 6 <= 128
    fuller = Conversation([Message("system", "S"), *chat.messages[skipped - 2 :]])
    assert len(TOKENIZER.prompt_ids(fuller)) + 6 > 128  # no more was left out than needed
    assert len(chat.messages) == 12  # nothing is forgotten


def test_a_message_that_never_fits_is_refused_and_not_kept(chat: Chat) -> None:
    shown = spoken(chat, ["word " * 200, "Hello"])
    assert "error: the prompt has" in shown
    assert [message.content for message in chat.messages if message.role == USER] == ["Hello"]


def test_undo_retry_reset_and_system(chat: Chat) -> None:
    spoken(chat, ["One", "Two"])
    first = chat.messages[3].content
    spoken(chat, ["/retry"])
    assert len(chat.messages) == 4
    assert chat.messages[3].content != first
    spoken(chat, ["/undo"])
    assert [message.content for message in chat.messages if message.role == USER] == ["One"]
    assert "there is no answer to take back" in spoken(chat, ["/undo", "/retry"])
    assert "there is nothing to take back" in spoken(chat, ["/undo"])
    spoken(chat, ["x", "/system Be brief.", "/reset"])
    assert (chat.messages, chat.system) == ([], "Be brief.")
    spoken(chat, ["/system"])
    assert chat.system is None


def test_params_change_or_are_refused_whole(chat: Chat) -> None:
    assert "temperature=0.5 top_k=20 top_p=0.9 max_length=6 seed=1" in spoken(
        chat, ["/params temperature=0.5 top_k=20"]
    )
    shown = spoken(chat, ["/params top_k=3 temperature=9", "/params heat=1", "/params top_k=x", "/params"])
    assert "temperature 9 is outside 0 to 2" in shown
    assert "no setting is called heat" in shown
    assert "top_k=x: 'x' is not a number" in shown
    assert "temperature=0.5 top_k=20" in shown


def test_save_and_load_in_the_form_that_training_reads(chat: Chat, tmp_path: Path) -> None:
    from lumina.data import convert

    file = tmp_path / "talk.jsonl"
    chat.system = "S"
    spoken(chat, ["Hello", f"/save {file}", "More", f"/save {file}"])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [len(line["messages"]) for line in lines] == [3, 5]
    assert isinstance(convert(lines[1]), Conversation)
    other = Chat(chat.model, chat.tokenizer, chat.sampling)
    assert "4 messages." in spoken(other, [f"/load {file}"])
    assert (other.system, other.messages) == ("S", chat.messages)
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "critic", "content": "x"}]}\n')
    for bad in ("bad.jsonl", "none.jsonl"):
        with pytest.raises(UserError, match=bad):
            other.load(tmp_path / bad)
    assert other.messages == chat.messages
    assert "/load needs a file" in spoken(other, ["/load"])


def test_an_interrupted_answer_keeps_what_was_said(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> Iterator[AnswerDelta]:
        answer = arguments[-2]
        assert isinstance(answer, Answer)
        answer.text += "Some"
        yield AnswerDelta(content="Some")
        raise KeyboardInterrupt

    monkeypatch.setattr("lumina.infer.repl.stream_answer", interrupted)
    assert "(stopped)" in spoken(chat, ["Hello"])
    assert chat.messages[-1] == Message(BOT, "Some")


def test_a_stop_text_ends_answers_and_is_not_kept(chat: Chat) -> None:
    spoken(chat, ["Hello"])
    whole = chat.messages[-1].content
    stop = whole[len(whole) // 2 :][:3].strip()
    spoken(chat, ["/reset", f"/stop {stop}", "Hello"])
    assert chat.messages[-1].content == whole[: whole.index(stop)]
    assert "No text ends an answer." in spoken(chat, ["/stop"])
    assert chat.sampling.stop == ()


def test_unknown_commands_and_leaving(chat: Chat) -> None:
    shown = spoken(chat, ["/hepl", "/help", "/quit", "never read"])
    assert "no such command: /hepl" in shown
    assert "/undo" in shown
    assert chat.messages == []


def test_output_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2J\x9b\r\x07b\n\tc🙂\u202e") == "a\\x1b[2J\\x9b\\x0d\\x07b\n\tc🙂\\u202e"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", make_model(num_layers=1))
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/params\n/quit\n"))
    assert main(["chat", str(run), "--max-length", "4", "--seed", "5", "--top-k", "7"]) == 0
    shown = capsys.readouterr().out
    assert "step 5" in shown
    assert "top_k=7 top_p=0.9 max_length=4 seed=5" in shown
    assert main(["chat", str(tmp_path / "none")]) == 2


def test_tools_reasoning_and_results(tmp_path: Path) -> None:
    """Shown, answered one by one, saved and read again as they were."""
    model, tokenizer = taught_model()
    chat = Chat(model, tokenizer, Sampling(0.0, max_length=100))
    (tmp_path / "tools.json").write_text(f"[{WEATHER}]")
    file = tmp_path / "talk.jsonl"
    lines = [f"/tools {tmp_path / 'tools.json'}", ASKED.content, "/tool rain", "/tool sun", f"/save {file}", "/tool x"]
    shown = spoken(chat, lines)
    assert "1 tools." in shown
    assert REASONING in shown
    assert 'calls get_weather({"city": "Bergen"})' in shown
    assert "1 more: get_weather is next." in shown
    assert ANSWER in shown
    assert "no tool call waits for a result" in shown
    assert chat.messages == list(CONVERSATIONS[0].messages)
    other = Chat(model, tokenizer, chat.sampling)
    other.load(file)
    assert (other.messages, other.tools) == (chat.messages, (WEATHER,))
