"""The quickstart's parts: its prompts, its configuration and what its script says. The whole of it takes minutes."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest

from lumina.config import load
from lumina.data import chitchat, everyday

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / "launchers/quickstart.sh").read_text()


def prompts() -> list[str]:
    listed = re.search(r"^prompts=\(\n(.*?)^\)", SCRIPT, re.MULTILINE | re.DOTALL)
    assert listed is not None
    return re.findall(r'^ +"(.*)"$', listed[1], re.MULTILINE)


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def test_no_prompt_stands_in_the_training_text() -> None:
    pytest.importorskip("chatterbot_corpus", reason="the extra quickstart is not installed")
    pytest.importorskip("chitchat_dataset", reason="the extra quickstart is not installed")
    exchanges, dialogues = everyday.read_exchanges(), [messages for _, messages in chitchat.read_dialogues()]
    openings = [messages[: everyday.OPENING] for messages in dialogues]
    messages = dialogues + exchanges + everyday.vary_exchanges(exchanges, openings)
    text = "\n".join(_words(message["content"]) for conversation in messages for message in conversation)
    assert _words("Tell me a joke") in text
    assert len(prompts()) == 3
    assert [prompt for prompt in prompts() if _words(prompt) in text] == []
    forms = runpy.run_path(str(ROOT / "benchmarks/paraphrases.py"))["FORMS"]
    assert [form for _, form in forms if _words(form) in text] == []
    assert {question for question, _ in forms} <= {messages[0]["content"] for messages in exchanges}


def test_the_configuration_is_one_that_the_script_makes_the_files_of() -> None:
    config = load(str(ROOT / "launchers/quickstart.yaml"), {}, [])
    written = {f"data/everyday/{name}" for name in (everyday.VARIED, everyday.OPENINGS_TRAIN)}
    assert {source.path for source in config.data} == written
    assert config.eval_data == [f"data/everyday/{everyday.OPENINGS_EVAL}"]
    assert "data=data/everyday\n" in SCRIPT
    assert f"--vocab-size {config.vocab_size}\n" in SCRIPT
    assert f"run=experiments/{config.experiment_name}\n" in SCRIPT
    assert config.num_parameters() < 5e6


def test_the_script_is_valid_and_ends_with_what_to_try() -> None:
    subprocess.run(["bash", "-n", ROOT / "launchers/quickstart.sh"], check=True)
    end = SCRIPT.partition("Now try")[2]
    for word in ("lumina chat", "lumina serve", "report.html", "my.jsonl", "docs/first-assistant.md"):
        assert word in end
