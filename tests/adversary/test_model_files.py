"""Attacks with the files of a model's tokenizer: (what is hostile, how it must end). None of them may hang."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from lumina.chat import Conversation, Message, OutOfBoundsError, open_tokenizer
from lumina.chat.hf.bounded import BoundedTokenizer
from lumina.config import UserError
from lumina.infer import export, import_hf, load
from tests.infer.serve.running_server import running, wait_for
from tests.infer.small_models import make_model, write_run, write_small_run
from tests.small_tokenizer import CHATML, VOCABULARY, write_tokenizer

LOOPS = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
GROWS = "{% set n = namespace(s='x' * 1000) %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
ON_WORD = "{% if messages[-1]['content'] == 'loop' %}" + LOOPS + "{% endif %}" + CHATML
HELLO = Conversation([Message("user", "Hello")])


def names(*contents: str) -> Callable[[dict[str, Any]], None]:
    def change(spec: dict[str, Any]) -> None:
        first = max(token["id"] for token in spec["added_tokens"]) + 1000
        spec["added_tokens"] += [
            {**spec["added_tokens"][0], "id": first + at, "content": content} for at, content in enumerate(contents)
        ]

    return change


def replaced(pattern: dict[str, str], content: str, times: int = 1, of: str = "decoder") -> Callable[[Any], None]:
    def change(spec: dict[str, Any]) -> None:
        step = {"type": "Replace", "pattern": pattern, "content": content}
        spec[of] = {"type": "Sequence", f"{of}s": [step] * times}

    return change


# Hostile tokenizer.json: refused, whatever is typed.
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a name with an escape": (names("a\ufdd2"), "set aside for escaping"),
    "names with all escapes": (names(*(f"a{chr(0xFDD2 + i)}" for i in range(30))), "set aside for escaping"),
    "a placeholder's sign": (names("<\ufdd0>"), "set aside for escaping"),
    "a decoder's expression": (replaced({"Regex": "(a+)+$"}, "x"), "regular expression"),
    "a decoder that grows": (replaced({"String": "a"}, "aa", 40), "times as long"),
}

# Hostile steps: ended by their bound.
ENDED: dict[str, tuple[str | None, Callable[[dict[str, Any]], None] | None, str]] = {
    "loops in loops": (LOOPS, None, "more than 1 s"),
    "calls of calls": (CALLS, None, "more than 1 s"),
    "texts of texts": (GROWS + "{{ n.s }}", None, "more than|MemoryError"),
    "a normalizer that grows": (None, replaced({"String": "e"}, "ee", 40, "normalizer"), "more than"),
}


def folder_with(tmp_path: Path, template: str | None, change: Callable[[dict[str, Any]], None] | None) -> Path:
    folder = write_tokenizer(tmp_path / "tokenizer", template or CHATML)
    if change is not None:
        spec = json.loads((folder / "tokenizer.json").read_text())
        change(spec)
        (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_when_it_is_read(tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_tokenizer(folder_with(tmp_path, None, change))


@pytest.mark.parametrize(("template", "change", "says"), ENDED.values(), ids=ENDED.keys())
def test_ended_by_its_bound(
    tmp_path: Path, template: str | None, change: Callable[[dict[str, Any]], None] | None, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        BoundedTokenizer(folder_with(tmp_path, template, change), 1.0, 1 << 30).prompt_ids(HELLO)


def test_a_bounded_tokenizer_is_the_same_as_without(tmp_path: Path) -> None:
    """Also after a step that was ended."""
    folder = folder_with(tmp_path, ON_WORD, None)
    plain, bounded = open_tokenizer(folder), open_tokenizer(folder, step_seconds=1.0)
    with pytest.raises(OutOfBoundsError):
        bounded.prompt_ids(Conversation([Message("user", "loop")]))
    talk = Conversation([Message("user", "a <|im_end|>"), Message("assistant", "b"), Message("user", "c")])
    for one in (talk, HELLO):
        assert bounded.prompt_ids(one) == plain.prompt_ids(one)
        assert bounded.message_spans(one) == plain.message_spans(one)
    ids = plain.encode("hello there ü")
    assert bounded.encode("hello there ü") == bounded.text_ids("hello there ü") == ids
    assert bounded.decode(ids) == plain.decode(ids)
    for name in ("stop_ids", "vocab_size", "pad_id", "begin_id", "fingerprint", "template_version", "earlier"):
        assert getattr(bounded, name) == getattr(plain, name)
    assert (bounded.allowed_tokens(600) == plain.allowed_tokens(600)).all()
    with pytest.raises(UserError, match="bad role"):
        bounded.prompt_ids(Conversation([Message("tool", "x", name="f", call_id="1")]))
    bounded.close()


def test_an_interrupted_step_does_not_answer_the_next(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, ON_WORD, None)
    bounded = open_tokenizer(folder, step_seconds=60.0)
    interrupt = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        bounded.prompt_ids(Conversation([Message("user", "loop")]))
    assert bounded.encode("hello") == open_tokenizer(folder).encode("hello")
    bounded.close()


def test_a_process_that_cannot_start_is_no_fault_of_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path, None, None)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with exit code 1"):
        BoundedTokenizer(folder, 59.0)


def test_import_of_a_template_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumina.infer.hf.importing.STEP_SECONDS", 1.0)
    export(write_small_run(tmp_path / "small", num_layers=1), tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(LOOPS)
    with pytest.raises(UserError, match="more than 1 s for one step"):
        import_hf(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_server_ends_the_step_and_goes_on(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "run" / "tokenizer", ON_WORD)
    run = write_run(tmp_path / "run", make_model(vocab_size=VOCABULARY, num_layers=1))
    with running(load(run, "fp32", 1.0), timeout=1.5) as server:

        def ask(text: str, most: int) -> httpx.Response:
            return server.post(json={"messages": [{"role": "user", "content": text}], "max_tokens": most})

        late = ask("loop", 2)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        wait_for(lambda: ask("hello", 1).status_code == 200)  # a new process begins with it, which takes its time
