"""The stock chat templates of TRL: which can be trained with as they are, on what, and which answers are read back.

    python benchmarks/chat_templates.py [--write docs/chat-templates.md] [NAME …]

Each template is given a byte-level tokenizer of its own special tokens and three conversations with reasoning: one with
tools and two calls in one turn, one with one call a turn, and one without tools. A verdict is what `lumina prepare`
does with the conversation; `reads back` is whether an answer's tokens become the same reasoning, content and calls
again, as `lumina serve` gives them.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from lumina.chat import Conversation, HFTokenizer, Message, ToolCall

#: Of models whose file names stop tokens that their template does not write after an answer.
STOPS = {"glm4moe": ("<|endoftext|>", "<|user|>", "<|observation|>"), "cohere2": ("<|END_OF_TURN_TOKEN|>",)}
_SPECIAL = re.compile(
    r"<\|\"\|>|<\|[A-Za-z_]+\|?>|<[A-Za-z_]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|\[gMASK\]|<sop>"
    r"|</?(?:think|tool_call|tool_response)>"
)
_WORDS = re.compile(r"</?(?:think|tool_call|tool_response)>")  # added tokens that are not special, as in Qwen3's file

TOOLS = tuple(
    json.dumps(
        {
            "type": "function",
            "function": {
                "name": name,
                "description": "Looks it up.",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string", "description": "Where."}},
                    "required": ["city"],
                },
            },
        }
    )
    for name in ("weather", "clock")
)
CALLS = (ToolCall("weather", '{"city": "Rome"}', "call00001"), ToolCall("clock", '{"city": "Rome"}', "call00002"))
RESULTS = (
    Message("tool", "sunny", name="weather", call_id="call00001"),
    Message("tool", "noon", name="clock", call_id="call00002"),
)
COLUMNS = ("two calls a turn", "one call a turn", "one call, no reasoning beside it", "without tools")


def conversation(calls: int, beside: bool = True) -> Conversation:
    """Two questions, of which the second is answered with so many tool calls; `beside`: with reasoning beside them."""
    thoughts = ("A greeting.", "I have tools for it." if beside else "", "Both are known.")
    asked = Message("assistant", "", reasoning=thoughts[1], tool_calls=CALLS[:calls])
    messages = [
        Message("user", "Hello"),
        Message("assistant", "Hi there.", reasoning=thoughts[0]),
        Message("user", "Weather and time in Rome?"),
        *([asked, *RESULTS[:calls]] if calls else []),
        Message("assistant", "Sunny, at noon.", reasoning=thoughts[2]),
    ]
    return Conversation(messages, tools=TOOLS if calls else ())


CONVERSATIONS = dict(zip(COLUMNS, map(conversation, (2, 1, 1, 0), (True, True, False, True)), strict=True))


def stock_templates() -> dict[str, str]:
    """The templates of models by name; TRL's own variants for training are left out."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    paths = sorted(path for path in folder.glob("*.jinja") if not path.stem.endswith("_training"))
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}


def write_tokenizer(folder: Path, name: str, template: str) -> Path:
    """A tokenizer of single bytes and of the special tokens that the template names; returns its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    named = sorted({"<|begin|>", "<|endoftext|>", *_SPECIAL.findall(template), *STOPS.get(name, ())})
    fast.add_special_tokens([token for token in named if not _WORDS.fullmatch(token)])
    fast.add_tokens([token for token in named if _WORDS.fullmatch(token)])
    folder.mkdir(parents=True)
    fast.save(str(folder / "tokenizer.json"))
    stops = STOPS.get(name, ("<|endoftext|>",))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": stops[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "date.json").write_text('{"date": "2026-11-28"}')
    if len(stops) > 1:
        ids = [fast.token_to_id(token) for token in stops]
        (folder / "stops.json").write_text(json.dumps({"stop_ids": ids}))
    return folder


class Sample(NamedTuple):
    """context and said: for each supervised message of one sample, what is before it and what the model is to say."""

    context: dict[int, str]
    said: dict[int, str]


def samples_of(tokenizer: HFTokenizer, given: Conversation) -> list[Sample] | str:
    """The samples of a conversation; why the template does not take it."""
    block, refused = tokenizer.render_valid([given])
    if refused:
        return refused[0]
    found = []
    for first, last in zip(block.conversation_offsets[:-1], block.conversation_offsets[1:], strict=True):
        start = block.message_offsets[first]
        context, said = {}, {}
        for message in range(first, last):
            if block.supervised[message]:
                begin = block.message_offsets[message] + block.head[message]
                end = begin + int((block.mask[begin:] == 0).argmax() if (block.mask[begin:] == 0).any() else 1 << 40)
                context[message - first] = tokenizer.decode(block.ids[start:begin])
                said[message - first] = tokenizer.decode(block.ids[begin:end])
        found.append(Sample(context, said))
    return found


def read_back(tokenizer: HFTokenizer, given: Message) -> bool | None:
    """Whether an answer's tokens are read as what it was made of; None: the template does not take it."""
    asked = Conversation([Message("user", "Go on"), given], tools=TOOLS if given.tool_calls else ())
    block, refused = tokenizer.render_valid([asked])
    if refused:
        return None
    begin = int(block.mask.argmax())
    reader = tokenizer.answer_reader(block.ids[:begin].tolist())
    deltas = [*(reader.push(token) for token in block.ids[block.mask == 1].tolist()), reader.end()]
    calls = [(call.name, json.loads(call.arguments)) for delta in deltas for call in delta.tool_calls]
    texts = "".join(delta.reasoning for delta in deltas), "".join(delta.content for delta in deltas)
    expected = [(call.name, json.loads(call.arguments)) for call in given.tool_calls]
    return (*texts, calls) == (given.reasoning, given.content, expected)


ANSWERS: dict[str, tuple[Message, ...]] = {
    "reasoning": (Message("assistant", "Hi there.\n\nSo.", reasoning="A\n\ngreeting."),),
    "calls": (
        Message("assistant", "", tool_calls=CALLS[:1]),
        Message("assistant", "", tool_calls=CALLS),
        Message("assistant", "", reasoning="Hm.", tool_calls=CALLS[:1]),
        Message("assistant", "Let me see.", tool_calls=CALLS[:1]),
    ),
}


class Row(NamedTuple):
    name: str
    verdicts: dict[str, str]  # by column
    system: bool
    reads: dict[str, str]  # by what is read: yes, partly, no, or empty
    said: str  # what is supervised of the first conversation that trains

    @property
    def trains(self) -> bool:
        return bool(self.said)


def examine(name: str, template: str, folder: Path) -> Row:
    """One template's row."""
    tokenizer = HFTokenizer(write_tokenizer(folder / name, name, template))
    verdicts, said = dict[str, str](), ""
    for column, given in CONVERSATIONS.items():
        found = samples_of(tokenizer, given)
        if isinstance(found, str):
            verdicts[column] = found
            continue
        verdicts[column] = "trains" if len(found) == 1 else f"trains, unrolled ({len(found)})"
        if not said:
            texts = [text for sample in found for text in sample.said.values()]
            said = "\n----\n".join(texts)
    spoken = [Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Hi.")]
    system = not isinstance(samples_of(tokenizer, Conversation(spoken)), str)
    reads = {}
    for what, answers in ANSWERS.items():
        found_back = [one for one in (read_back(tokenizer, answer) for answer in answers) if one is not None]
        reads[what] = "" if not found_back else "yes" if all(found_back) else "partly" if any(found_back) else "no"
    return Row(name, verdicts, system, reads, said)


HEADER = """# Chat templates

Made by `python benchmarks/chat_templates.py --write docs/chat-templates.md` from the templates that TRL {version} ships
for its models ({count} of them).

Every imported model keeps its own chat template. A conversation is trained on so that, for each answer, the context is
what the template renders with the generation prompt, and what is supervised is what the model is to say after it, its
stop token included. *Unrolled*: the template renders earlier turns otherwise once later ones follow (Qwen3 leaves
their reasoning out), so that the conversation becomes that many samples, in each of which what follows its own context
is supervised. A conversation of which the template leaves out a part is refused, counted by the reason in the table:

| the template | what to do |
|---|---|
| leaves out the tools | use a conversation without tools, or a model whose template has a place for them |
| takes one tool call a turn only | one call a turn: the call, its result, the next call |
| leaves out the reasoning or the content beside tool calls | leave that field out of the turns that call tools |
| leaves out the user's message, or wants a content to have parts | it is for images; take the model's text version |
| does not take a system message | put its text at the beginning of the first question |

*Reads back*: whether an answer's tokens become the reasoning and the calls that they were made of, as `lumina serve`
gives them; what cannot be told apart is given as content. A template without a field for reasoning has it at the
beginning of the content, within `<think>`.

"""


def table(rows: list[Row], version: str) -> str:
    """The document."""
    lines = [HEADER.format(version=version, count=len(rows))]
    trained = [row for row in rows if row.trains]
    full = sum(row.verdicts[COLUMNS[0]].startswith("trains") for row in rows)
    lines.append(
        f"{len(trained)} of {len(rows)} train; {full} of them on tools, reasoning and two calls in one turn.\n\n"
    )
    titles = ["template", *COLUMNS, "system message", "reads back: reasoning", "calls"]
    lines.append(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}\n")
    for row in rows:
        cells = [row.name, *row.verdicts.values(), "yes" if row.system else "no", *row.reads.values()]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    lines.append("\n## What is supervised\n\nOf the first of the conversations that the template takes.\n")
    for row in trained:
        lines.append(f"\n### {row.name}\n\n```text\n{row.said}\n```\n")
    return "".join(lines)


def examined(names: list[str] | None = None) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        found = stock_templates().items()
        return [examine(name, text, Path(folder)) for name, text in found if not names or name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="templates; all of them")
    parser.add_argument("--write", type=Path, help="a file to write instead")
    arguments: Any = parser.parse_args()
    import trl

    text = table(examined(arguments.names), trl.__version__)
    if arguments.write is None:
        print(text)
    else:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
