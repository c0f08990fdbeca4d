"""Attacks with the files of a model's tokenizer: (what is hostile, how it must end). None of them may hang."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from lumina.chat import ClosedError, Conversation, Message, OutOfBoundsError, open_tokenizer
from lumina.chat.hf.bounded import BoundedTokenizer
from lumina.cli import main
from lumina.config import UserError
from lumina.config import load as load_settings
from lumina.data import prepare
from lumina.infer import export, import_hf, load
from lumina.infer.generation.constraint import GrammarCompiler
from lumina.infer.hf.vocabulary import add_tokens
from lumina.infer.serve import make_service
from tests.infer.serve.running_server import running, wait_for
from tests.infer.small_models import make_model, write_run, write_small_run
from tests.runs.processes import clean_environment
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
    plain, bounded = open_tokenizer(folder, tried=True), open_tokenizer(folder, step_seconds=1.0)
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


def test_a_process_that_had_nothing_to_do_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumina.chat.hf.bounded.IDLE_SECONDS", 1.0)
    bounded = BoundedTokenizer(folder_with(tmp_path, None, None), 31.0)
    ids = bounded.encode("hello")
    assert bounded._process._running is not None
    assert bounded._process._running[0].wait(120) == 0
    assert bounded.encode("hello") == ids
    bounded.close()


def test_an_interrupted_step_does_not_answer_the_next(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, ON_WORD, None)
    bounded, main_thread = BoundedTokenizer(folder, 60.0), threading.main_thread().ident
    assert bounded._process._running is not None
    other = psutil.Process(bounded._process._running[0].pid)
    begun = other.cpu_times().user

    def interrupt() -> None:
        """Once the step is at work."""
        wait_for(lambda: other.cpu_times().user > begun + 0.3)
        assert main_thread is not None
        signal.pthread_kill(main_thread, signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        bounded.prompt_ids(Conversation([Message("user", "loop")]))
    interrupting.join()
    assert bounded.encode("hello") == open_tokenizer(folder).encode("hello")
    bounded.close()


def test_a_process_that_cannot_start_is_no_fault_of_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path, None, None)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with exit code 1"):
        BoundedTokenizer(folder, 59.0)


def test_import_of_a_template_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumina.chat.hf.bounded.STEP_SECONDS", 1.0)
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


def test_a_grammar_does_not_wait_for_a_prompt(tmp_path: Path) -> None:
    """The thread that decodes every answer asks the grammar. A step that is ended with the server is no fault of the
    model's."""
    pytest.importorskip("llguidance", reason="llguidance is not installed: the extra `serve`")
    run, before = hostile_run(tmp_path, ON_WORD), set(psutil.Process().children())
    service = make_service(load(run, "fp32", 19.0), slots=1, queue=1, max_tokens=2, timeout=19.0)
    (other,) = set(psutil.Process().children()) - before
    ids, begun = service.tokenizer.encode('"hello"'), other.cpu_times().user
    ended: list[Exception] = []

    def ask() -> None:
        try:
            service.tokenizer.prompt_ids(Conversation([Message("user", "loop")]))
        except Exception as error:
            ended.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        wait_for(lambda: other.cpu_times().user > begun + 0.3)
        constraint = service.grammars.json({"const": "hello"})()
        for token in ids:
            assert not constraint.forbidden()[token]
            constraint.push(token)
        assert not ended
    finally:
        service.close()
        asking.join()
    assert [type(error) for error in ended] == [ClosedError]


def hostile_run(tmp_path: Path, template: str) -> Path:
    """A run with a model's own tokenizer, and conversations in a.jsonl."""
    write_tokenizer(tmp_path / "run" / "tokenizer", template)
    turns = [{"role": "user", "content": "loop"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    return write_run(tmp_path / "run", make_model(vocab_size=VOCABULARY, num_layers=1))


DATA = "--config nano --set tokenizer=run/tokenizer --cache-dir cache --num-workers 1"
# Command lines that open a model's own tokenizer, and those that meet a word on which its template does not end, with
# the seconds after which they do: 0.25 of a block of data, or of a conversation of any length.
OPENS = [
    *("chat run", "evaluate run --data a.jsonl", "export run out", "generate run --prompt hello"),
    *(f"inspect a.jsonl {DATA}", f"prepare a.jsonl {DATA}", f"prepare --dry-run a.jsonl {DATA}"),
]
MEETS = {
    "generate run --prompt loop": 2,
    "evaluate run --data a.jsonl": 0.25,
    f"inspect a.jsonl --line 1 {DATA}": 0.25,
    f"prepare a.jsonl {DATA}": 0.25,
}


@pytest.mark.timeout(300)
def test_no_command_hangs_with_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile_run(tmp_path, LOOPS)
    monkeypatch.setattr("lumina.chat.hf.bounded.STEP_SECONDS", 0.25)
    for line in OPENS:
        assert main(line.split()) == 2, line
        err = capsys.readouterr().err
        assert "takes more than 0.25 s for one step" in err, line
        assert "Traceback" not in err, line
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "a.jsonl", "cache"}


@pytest.mark.timeout(300)
def test_no_command_hangs_on_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the template does not end on is in a prompt or in the data."""
    monkeypatch.chdir(tmp_path)
    hostile_run(tmp_path, ON_WORD)
    monkeypatch.setattr("lumina.chat.hf.bounded.STEP_SECONDS", 2.0)
    monkeypatch.setattr("lumina.chat.hf.bounded.BLOCK_SECONDS", 0.25)
    for line, seconds in MEETS.items():
        assert main(line.split()) == 2, line
        err = capsys.readouterr().err
        assert f"takes more than {seconds} s for one step" in err, line
        assert "Traceback" not in err, line


def test_a_worker_of_prepare_ends_with_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = "lumina.data.preparing.pool"
    monkeypatch.setattr(f"{pool}.BYTES_PER_WORKER", 1)
    monkeypatch.setattr(f"{pool}.BLOCK_SECONDS", 0.25)
    folder = hostile_run(tmp_path, ON_WORD) / "tokenizer"
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    config = load_settings("nano", {"tokenizer": str(folder), "cache_dir": str(tmp_path / "cache")})
    with pytest.raises(UserError, match=r"tokenizer or chat template takes more than 0\.25 s"):
        prepare([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], config, open_tokenizer(folder), workers=2)


def test_special_tokens_are_added_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a vocabulary to add to it normalizes the tokens that were added before."""

    def change(spec: dict[str, Any]) -> None:
        replaced({"String": "e"}, "ee", 40, "normalizer")(spec)
        spec["added_tokens"].append({**spec["added_tokens"][0], "id": 400, "content": "e", "normalized": True})

    monkeypatch.setattr("lumina.chat.hf.bounded.STEP_SECONDS", 1.0)
    monkeypatch.setattr("lumina.chat.hf.bounded.STEP_BYTES", 1 << 30)
    folder = folder_with(tmp_path, None, change)
    with pytest.raises(OutOfBoundsError, match="more than"):
        add_tokens(folder, "llama3", [])


def test_a_grammar_does_not_run_what_a_vocabulary_holds(tmp_path: Path) -> None:
    """llguidance reads the vocabulary in this process. What may come next is the same with a normalizer that makes each
    letter 256: it is not run."""
    pytest.importorskip("llguidance", reason="llguidance is not installed: the extra `serve`")
    plain = open_tokenizer(folder_with(tmp_path / "plain", None, None))
    hostile = open_tokenizer(folder_with(tmp_path / "hostile", None, replaced({"String": "a"}, "aa", 8, "normalizer")))
    schema = {"type": "object", "properties": {"aaaa": {"const": "aaaa"}}, "required": ["aaaa"]}
    first, second = (GrammarCompiler(one, VOCABULARY).json(schema)() for one in (plain, hostile))
    for token in plain.encode('{"aaaa": "aaaa"}'):
        assert second.forbidden().equal(first.forbidden())
        assert not first.forbidden()[token]
        first.push(token)
        second.push(token)
    assert second.forbidden().equal(first.forbidden())


def test_a_server_ends_within_a_step_that_does_not(tmp_path: Path) -> None:
    """SIGTERM while a template loops; the step itself would be ended after an hour."""
    run = hostile_run(tmp_path, ON_WORD)
    slow = (
        "from lumina.infer.serve import server; from lumina.cli import main; import sys; server.STEP_SECONDS = 3600.0"
    )
    command = [sys.executable, "-P", "-c", f"{slow}; sys.exit(main(sys.argv[1:]))", "serve", str(run), "--port", "0"]
    environment = clean_environment()
    words = [*command, "--precision", "fp32", "--timeout", "3600"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stdout is not None
            address = child.stdout.readline().split()[-1]
            (other,) = psutil.Process(child.pid).children()
            before = other.cpu_times().user
            body = {"messages": [{"role": "user", "content": "loop"}], "max_tokens": 2}
            told: list[int] = []
            ask = threading.Thread(
                target=lambda: told.append(
                    httpx.post(f"{address}v1/chat/completions", json=body, timeout=200).status_code
                )
            )
            ask.start()
            wait_for(lambda: other.cpu_times().user > before + 0.3)
            child.terminate()
            _, errors = child.communicate(timeout=200)
        finally:
            child.kill()
    ask.join()
    assert child.returncode == 0, errors
    assert "Traceback" not in errors
    assert told == [503]
    assert not other.is_running()
