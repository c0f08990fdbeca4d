"""`lumina generate` and `lumina.generate` with tools and reasoning: own models and imported ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import lumina
from lumina.cli import main
from lumina.infer import Loaded
from tests.infer.small_models import write_run
from tests.infer.taught_models import ANSWER, ASKED, CALLS, REASONING, WEATHER, taught, taught_qwen3

TOOLS = [json.loads(WEATHER)]
GREEDY = {"temperature": 0.0, "max_length": 256}


@pytest.fixture(scope="module", params=["own", "imported"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    make: Callable[[Path], Loaded] = taught if request.param == "own" else taught_qwen3
    return make(tmp_path_factory.mktemp(request.param))


def test_the_command_prints_calls_and_reasoning(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on disk, read by the command: text and calls on stdout, reasoning on stderr, and all of it as JSON."""
    folder = loaded.tokenizer.folder
    if folder is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/tokenizer").symlink_to(folder)
    run, tools = write_run(tmp_path / "run", loaded.model, world=1), tmp_path / "tools.json"
    tools.write_text(json.dumps({"tools": TOOLS}))
    line = ["generate", str(run), "--prompt", ASKED.content, "--temperature", "0", "--max-length", "256"]
    assert main([*line, "--tools", str(tools), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["reasoning"].strip() == REASONING
    assert [(call["name"], json.loads(call["arguments"])) for call in said["tool_calls"]] == [
        (call.name, json.loads(call.arguments)) for call in CALLS
    ]
    assert said["text"].strip() == ""
    assert said["finish_reason"] == "stop"

    assert main([*line, "--tools", str(tools), "--thinking"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(one)["tool_call"]["name"] for one in out.split("\n") if one.strip()] == ["get_weather"] * 2
    assert REASONING in err
    assert main([*line, "--tools", str(tools), "--no-thinking", "--json"]) == 0
    assert "reasoning" not in json.loads(capsys.readouterr().out)

    tools.write_text('{"name": 5}')
    assert main([*line, "--tools", str(tools)]) == 2
    assert str(tools) in capsys.readouterr().err


def test_the_function_answers_with_calls_and_takes_their_results(loaded: Loaded) -> None:
    first = lumina.generate(loaded, ASKED.content, tools=TOOLS, **GREEDY)
    assert first.reasoning.strip() == REASONING
    assert [(call.name, json.loads(call.arguments)) for call in first.tool_calls] == [
        (call.name, json.loads(call.arguments)) for call in CALLS
    ]
    assert first.finish == "stop"
    assert lumina.generate(loaded, ASKED.content, tools=TOOLS, thinking=False, **GREEDY).reasoning == ""
    calls = [
        {"id": f"call_{number}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for number, call in enumerate(first.tool_calls)
    ]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "name": "get_weather", "content": content}
        for call, content in zip(calls, ["rain", "sun"], strict=True)
    ]
    asked = {"role": "user", "content": ASKED.content}
    answered = {"role": "assistant", "content": None, "reasoning_content": REASONING, "tool_calls": calls}
    second = lumina.generate(loaded, [asked, answered, *results], tools=TOOLS, **GREEDY)
    assert second.text.strip() == ANSWER
    assert not second.tool_calls
