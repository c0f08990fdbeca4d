"""A template with strict rules: turns that alternate, ids of nine characters, calls in a list with their ids, the
system message and the tools before the last question only, and nothing that begins an answer."""

from __future__ import annotations

import json

import pytest

from lumina.chat import Conversation, HFTokenizer, Message, ToolCall

TEMPLATE = """{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}
{%- set loop_messages = messages[1:] %}
{%- else %}
{%- set loop_messages = messages %}{%- endif %}
{%- set users = loop_messages | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(want_user=true) %}
{%- for m in loop_messages %}
{%- if not (m.role == 'tool' or (m.role == 'assistant' and m.tool_calls is defined and m.tool_calls)) %}
{%- if (m.role == 'user') != ns.want_user %}
{{- raise_exception('roles must alternate user/assistant') }}
{%- endif %}
{%- set ns.want_user = not ns.want_user %}
{%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for m in loop_messages %}
{%- if m.role == 'user' %}
{%- if tools and m == users[-1] %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}
{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}
{%- endif %}
{%- elif m.tool_calls is defined and m.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for c in m.tool_calls %}
{%- if c.id is not defined or c.id | length != 9 %}
{{- raise_exception('an id has nine characters') }}
{%- endif %}
{{- '{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) + ', "id": "' + c.id + '"}' }}
{%- if not loop.last %}{{- ', ' }}
{%- endif %}
{%- endfor %}
{{- ']' + eos_token }}
{%- elif m.role == 'assistant' %}
{{- ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}
{{- raise_exception('an id has nine characters') }}
{%- endif %}
{{- '[TOOL_RESULTS] {"content": ' + (m.content | tojson) + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}"""
MARKS = (
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
TOOLS = ('{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}',)
SYSTEM, FIRST, SECOND = (
    Message("system", "Answer briefly."),
    Message("user", "How are you?"),
    Message("user", "Where are you?"),
)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("strict")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<s>", "</s>", *MARKS])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return HFTokenizer(folder)


def samples(tokenizer: HFTokenizer, *messages: Message) -> list[tuple[str, list[str]]]:
    """Of each sample the whole text, and what is supervised."""
    found = []
    for sample in tokenizer.tokenize(
        Conversation(messages, tools=TOOLS if any(m.tool_calls for m in messages) else ())
    ):
        said = [tokenizer.decode(sample.ids[start:end].tolist()) for start, end in sample.supervised.values()]
        found.append((tokenizer.decode(sample.ids.tolist()), said))
    return found


def call(number: str, city: str = "Rome") -> ToolCall:
    return ToolCall("weather", json.dumps({"city": city}), number)


def test_a_system_message_that_only_the_question_to_answer_has(strict: HFTokenizer) -> None:
    chat = [SYSTEM, FIRST, Message("assistant", "Well."), SECOND, Message("assistant", "Here.")]
    first, second = samples(strict, *chat)
    asked = "<s>[INST] Answer briefly.\n\nHow are you?[/INST]"
    assert first == (f"{asked} Well.</s>", [" Well.</s>"])
    asked = "<s>[INST] How are you?[/INST] Well.</s>[INST] Answer briefly.\n\nWhere are you?[/INST]"
    assert second == (f"{asked} Here.</s>", [" Here.</s>"])
    assert strict.decode(strict.prompt_ids(Conversation(chat[:4]))) == asked
    only = samples(strict, *chat[:4], chat[4]._replace(supervise=False))
    assert [said for _, said in only] == [[" Well.</s>"], []]


@pytest.mark.parametrize("number", ["", "abcdefghi", "call_8bE2", "toolu_01A09q90qw90lq917835lq9"])
def test_calls_with_any_id_train_and_are_read_back(strict: HFTokenizer, number: str) -> None:
    calls = call(number), call(f"{number[:-1]}z" if number else "", "Oslo")
    results = [Message("tool", one.arguments, call_id=one.id) for one in reversed(calls)]
    ((text, said),) = samples(
        strict, FIRST, Message("assistant", "", tool_calls=calls), *results, Message("assistant", "So.")
    )
    kept = number == "abcdefghi"
    ids = ("abcdefghi", "abcdefghz") if kept else ("000000000", "000000001")
    listed = ", ".join(
        f'{{"name": "weather", "arguments": {one.arguments}, "id": "{own}"}}'
        for one, own in zip(calls, ids, strict=True)
    )
    assert said == [f"[TOOL_CALLS] [{listed}]</s>", " So.</s>"]
    assert text.count(f'"call_id": "{ids[0]}"') == text.count(f'"call_id": "{ids[1]}"') == 1
    assert not number or text.index(f'"call_id": "{ids[1]}"') < text.index(f'"call_id": "{ids[0]}"')
    for spoken, content, names in ((said[0], "", ["Rome", "Oslo"]), (said[1], "So.", [])):
        reader = strict.answer_reader()
        tokens = HFTokenizer.encode(strict, spoken.removeprefix("[TOOL_CALLS]").removesuffix("</s>"))
        begun = [strict._escaping.special_ids["[TOOL_CALLS]"]] if names else []
        deltas = [*map(reader.push, [*begun, *tokens]), reader.end()]
        assert "".join(delta.content for delta in deltas) == content
        assert [json.loads(own.arguments)["city"] for delta in deltas for own in delta.tool_calls] == names


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([FIRST, SECOND, Message("assistant", "a")], "roles must alternate"),
        ([FIRST, Message("assistant", "b", tool_calls=(call(""),))], "leaves out the content beside tool calls"),
    ],
)
def test_what_it_refuses_is_refused_for_its_reason(strict: HFTokenizer, messages: list[Message], reason: str) -> None:
    _, refused = strict.render_valid([Conversation(messages, tools=TOOLS)])
    assert reason in refused[0]
