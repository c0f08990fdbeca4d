"""Every stock template of TRL: contexts and what is supervised, held to renderings by jinja2 alone, turn by turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lumina.chat import Conversation, HFTokenizer, Message
from tests.chat.hf.reference import turns
from tests.outside import command_at

trl = pytest.importorskip("trl")
ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs/chat-templates.md"
command = command_at(ROOT / "benchmarks/chat_templates.py")
TEMPLATES: dict[str, str] = command.stock_templates()
COLUMNS: tuple[str, ...] = command.COLUMNS
IMAGES = {"idefics3", "llava_next", "smolvlm"}  # their contents are lists of parts
#: What is said where no rendering has it: DeepSeek's templates leave the reasoning out that their prompt opens, and an
#: answer of gpt-oss's changes what is before it.
UNRENDERED = {"deepseek_r1_distill", "deepseekv3", "gptoss"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stock")


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, Any]:
    return {name: command.examine(name, template, folder / "rows") for name, template in TEMPLATES.items()}


def opened(folder: Path, name: str) -> HFTokenizer:
    own = folder / name
    return HFTokenizer(own if own.is_dir() else command.write_tokenizer(own, name, TEMPLATES[name]))


def plainly(given: Conversation) -> Conversation:
    return Conversation([message._replace(reasoning="") for message in given.messages], tools=given.tools)


GIVEN = {
    **command.CONVERSATIONS,
    **{f"{name}, no reasoning": plainly(given) for name, given in command.CONVERSATIONS.items()},
}


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - IMAGES))
def test_every_turn_follows_what_inference_would_render_before_it(folder: Path, name: str) -> None:
    tokenizer = opened(folder, name)
    names = {"bos_token": "<|begin|>", "eos_token": eos_of(tokenizer)}
    trained = 0
    for given in GIVEN.values():
        samples = command.samples_of(tokenizer, given)
        if isinstance(samples, str):
            continue
        trained += 1
        supervised = sorted(at for sample in samples for at in sample.said)
        assert supervised == [at for at, message in enumerate(given.messages) if message.role == "assistant"]
        for sample in samples:
            for at, context in sample.context.items():
                check_turn(tokenizer, TEMPLATES[name], names, given, at, context, sample.said[at], name in UNRENDERED)
    assert trained >= 2


def eos_of(tokenizer: HFTokenizer) -> str:
    assert tokenizer.folder is not None
    return str(json.loads((tokenizer.folder / "tokenizer_config.json").read_text())["eos_token"])


def check_turn(
    tokenizer: HFTokenizer,
    template: str,
    names: dict[str, str],
    given: Conversation,
    at: int,
    context: str,
    said: str,
    unrendered: bool,
) -> None:
    stops = [tokenizer.decode([stop]) for stop in tokenizer.stop_ids]
    stop = next(own for own in stops if said.endswith(own))
    body = said.removesuffix(stop)
    assert not any(own in body for own in stops)
    message = given.messages[at]
    texts = [message.content, message.reasoning, *(text for call in message.tool_calls for text in (call.name, "Rome"))]
    assert all(text in body for text in texts)
    prompts = set()
    for prompt, whole in turns(template, names, given.messages, given.tools, at):
        prompts.add(prompt)
        if prompt != context:
            continue
        rest = whole.removeprefix(prompt) if whole.startswith(prompt) else ""
        if rest == body or rest.startswith(said) or (unrendered and not rest):
            return
    assert context in prompts, "the context is no prompt of the template's"
    raise AssertionError(f"the template does not render {said!r} after {context[-200:]!r}")


SAID = {
    "qwen3": [
        "<think>\nA greeting.\n</think>\n\nHi there.<|im_end|>",
        '<think>\nI have tools for it.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "clock", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
        "<think>\nBoth are known.\n</think>\n\nSunny, at noon.<|im_end|>",
    ],
    "glm4moe": [
        "\n<think>A greeting.</think>\nHi there.<|user|>",
        "\n<think>I have tools for it.</think>"
        "\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>\n<tool_call>clock\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>"
        "<|observation|>",
        "\n<think>Both are known.</think>\nSunny, at noon.<|user|>",
    ],
    "gptoss": [
        "<|channel|>analysis<|message|>A greeting.<|end|><|start|>assistant<|channel|>final<|message|>"
        "Hi there.<|return|>",
        "<|channel|>analysis<|message|>I have tools for it.<|end|><|start|>assistant to=functions.weather<|channel|>"
        'commentary json<|message|>{"city": "Rome"}<|call|>',
        "<|channel|>analysis<|message|>Both are known.<|end|><|start|>assistant<|channel|>final<|message|>"
        "Sunny, at noon.<|return|>",
    ],
    "deepseek_r1_distill": [
        "A greeting.\n</think>\n\nHi there.<｜end▁of▁sentence｜>",
        "Both are known.\n</think>\n\nSunny, at noon.<｜end▁of▁sentence｜>",
    ],
    "llama3_2": ["Hi there.<|eot_id|>", '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>', "<|eot_id|>"],
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_said_word_for_word(folder: Path, name: str) -> None:
    column = {"gptoss": COLUMNS[1], "deepseek_r1_distill": COLUMNS[3], "llama3_2": COLUMNS[2]}.get(name, COLUMNS[0])
    samples = command.samples_of(opened(folder, name), GIVEN[column])
    assert not isinstance(samples, str), samples
    said = dict(sorted((at, text) for sample in samples for at, text in sample.said.items()))
    if name == "llama3_2":
        assert all(text.endswith(own) for text, own in zip(said.values(), SAID[name], strict=True))
    else:
        assert list(said.values()) == SAID[name]


def test_what_cannot_be_kept_is_refused_by_the_field_that_the_template_leaves_out(rows: dict[str, Any]) -> None:
    first = {name: row.verdicts[COLUMNS[0]] for name, row in rows.items()}
    assert first["phi3"] == first["llama3"] == "the chat template leaves out the tools"
    assert first["gptoss"] == "the chat template leaves out all tool calls of a turn but one"
    assert first["lfm2"] == "the chat template leaves out the tool calls"
    assert first["gemma4_v2"] == "the chat template leaves out the reasoning beside tool calls"
    assert first["llama3_2"].endswith("This model only supports single tool-calls at once!")
    trained = [row for name, row in rows.items() if name not in IMAGES and row.trains]
    assert len(trained) == len(rows) - len(IMAGES)
    assert sum(verdict.startswith("trains") for verdict in first.values()) >= 21
    assert all(
        rows[name].reads["calls"] == "yes" for name in ("qwen3", "qwen3_5_think", "glm4moe", "llama3_2", "lfm2_v2")
    )


def test_a_field_that_only_some_contents_lose_is_refused_in_those(folder: Path) -> None:
    """Muse Glimmer's template leaves a content out beside tool calls, even one that the turn has elsewhere."""
    muse, user = opened(folder, "muse_glimmer"), Message("user", "Rome?")
    for content, reason in (("", ""), ("Rome", "the chat template leaves out the content beside tool calls")):
        asked = Conversation([user, Message("assistant", content, tool_calls=command.CALLS)], tools=command.TOOLS)
        assert muse.render_valid([asked])[1].get(0, "") == reason


def test_the_document_is_what_the_command_makes(rows: dict[str, Any]) -> None:
    if f"TRL {trl.__version__} " not in DOCUMENT.read_text(encoding="utf-8"):
        pytest.skip(f"the document was made with another TRL than {trl.__version__}")
    assert command.table(list(rows.values()), trl.__version__) == DOCUMENT.read_text(encoding="utf-8")
