"""Runs with Lumina's own tokenizer: killed, resumed and gone on with under the chat template that they were begun with,
that of version 0.2.0 among them, which recorded none."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lumina.cli import main
from lumina.config import load
from tests.earlier_versions import as_of_0_2
from tests.runs import Runs, arguments, differing, final, held_at, newest, steps

pytestmark = pytest.mark.timeout(900)  # the first start on a machine compiles DeepSpeed's operators

STEPS, KILLED = 10, 5
SETTINGS: dict[str, Any] = {
    "hidden_size": 8,
    "num_layers": 1,
    "seq_length": 128,
    "precision": "fp32",
    "batch_size": 2,
    "global_batch_size": 4,
    "max_steps": STEPS,
    "save_every_n_batches": 2,
    "learning_rate": 1e-3,
    "keep_last": 9,
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def write_agents(path: Path, reasoned: bool) -> Path:
    """Conversations with a tool's result, which the two templates render differently; `reasoned`: with tools, calls and
    reasoning too, which the first has no form for."""
    rng = random.Random(4)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(30):
            a, b = rng.randrange(100), rng.randrange(100)
            call = {"type": "function", "function": {"name": "add", "arguments": json.dumps({"a": a, "b": b})}}
            said = {"content": None, "reasoning_content": "Add them.", "tool_calls": [call]}
            messages = [
                {"role": "user", "content": f"{a} + {b}?"},
                {"role": "assistant", **(said if reasoned else {"content": f"add {a} {b}"})},
                {"role": "tool", "content": str(a + b)},
                {"role": "assistant", "content": f"It is {a + b}."},
            ]
            file.write(json.dumps({"messages": messages, **({"tools": [TOOL]} if reasoned else {})}) + "\n")
    return path


@pytest.mark.parametrize("template", [pytest.param("im-roles-1", marks=pytest.mark.long), "im-roles-2"])
def test_a_run_keeps_its_template(template: str, runs: Runs, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = template == "im-roles-1"
    data = write_agents(place / "train.jsonl", reasoned=not first)
    settings = {**SETTINGS, "cache_dir": place / "cache"}
    given = {"chat_template": template} if first else {}
    whole, run = place / "whole", place / "killed"
    runs.train(arguments(whole, data, whole_vocabulary=True, **settings, **given))
    argv = arguments(run, data, whole_vocabulary=True, **settings, **given)
    job = runs.start(argv, patch=partial(held_at, STEPS - 1))
    job.wait_for_step(KILLED)
    job.wait_for_checkpoint()
    job.kill()
    if first:
        as_of_0_2(run)
    runs.train([*arguments(run, data, whole_vocabulary=True, **settings), "--resume", "auto"])
    assert differing(final(run, STEPS), final(whole, STEPS)) == []
    assert [record["step"] for record in steps(run)] == list(range(1, STEPS + 1))
    assert json.loads((newest(run) / "trainer.json").read_text())["chat_template"] == template
    assert load(str(run / "config.yaml")).chat_template == template

    _begun_with(as_of_0_2(run) if first else run, template, runs, data, place)
    _asked(run, template, place, capsys)


def _begun_with(run: Path, template: str, runs: Runs, data: Path, place: Path) -> None:
    """Another run begins with its weights."""
    settings = {**SETTINGS, "max_steps": 1, "cache_dir": place / "cache"}
    argv = arguments(place / "next", data, whole_vocabulary=True, **settings)
    job = runs.train([*argv, "--init-from", str(run)])
    assert load(str(place / "next/config.yaml")).chat_template == template
    said = job.stdout() + job.stderr()
    assert (f"chat template {template}, which" in said) == (template == "im-roles-1")


def _asked(run: Path, template: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """generate, evaluate and export have its template: only the second has a form for tools."""
    tools = place / "tools.json"
    tools.write_text(json.dumps([TOOL]))
    ask = ["generate", str(run), "--prompt", "1 + 2?", "--max-length", "2", "--temperature", "0"]
    capsys.readouterr()
    assert main([*ask, "--tools", str(tools)]) == (2 if template == "im-roles-1" else 0)
    assert ("no form for" in capsys.readouterr().err) == (template == "im-roles-1")
    assert main(ask) == 0
    held = write_agents(place / "held.jsonl", reasoned=True)
    assert main(["evaluate", str(run), "--data", str(held), "--json"]) == (2 if template == "im-roles-1" else 0)
    capsys.readouterr()
    assert main(["export", str(run), str(place / "hf")]) == 0
    described = json.loads((place / "hf/tokenizer_config.json").read_text())
    assert ("<|tool_call|>" in described["chat_template"]) == (template == "im-roles-2")
