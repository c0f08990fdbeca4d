"""`lumina inspect --line`: one record of a file, from what stands there to the tokens that training gets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from rich.text import Text

from lumina.chat import ChatTokenizer, Conversation, is_supervised
from lumina.config import UserError
from lumina.data.converting.columns import check_columns, described, renamed
from lumina.data.formats import convert, format_of
from lumina.data.preparing.building import PrepareSettings
from lumina.data.reading.items import Item, read_items
from lumina.data.reading.layout import detect
from lumina.data.reading.paths import check_inputs
from lumina.data.reading.streams import FileLayout
from lumina.data.records.fault import BLANK, Fault, Tree
from lumina.data.records.fields import FieldTally
from lumina.data.reports.inspection import coloured

PLAIN_FIELDS = ("role", "content")
SHOWN_CHARACTERS, SHOWN_ITEMS = 2000, 20  # of a long text or list, at its beginning and at its end


def describe_record(
    path: str, number: int, config: PrepareSettings, tokenizer: ChatTokenizer, ends: int | None = None
) -> dict[str, Any]:
    """What becomes of the record `number` of a file, as accounts count them (a line of JSON lines, from 1; of single
    OASST messages the tree that the message is in): the raw record, its format, the reason why it is skipped, fields by
    sort, and its conversations with the messages, ids and mask that training's reader and template make of them. ends:
    so many of a rendering's first and of its last tokens alone; `samples` counts all, and those `left_out`.

    Raises:
        UserError: there is no such record, or a column is mapped that the file has not.
    """
    (file,) = check_inputs([path])
    layout = detect(str(file))
    if config.columns:
        check_columns(str(file), layout, config.columns)
        layout = layout._replace(flat=False)
    items = list(_items_at(str(file), layout, number))
    records = [_described(item, config, tokenizer, ends) for item in items]
    return {"file": str(file), "line": number, "columns": dict(config.columns), "records": records}


def _items_at(path: str, layout: FileLayout, number: int) -> Iterator[Item]:
    last, found = 0, False
    for item in read_items(path, layout):
        last = max(last, item.number)
        if item.number == number or (layout.flat and number in _numbers(item.record)):
            found = True
            yield item
        elif found and not layout.flat:
            return
    if not found:
        raise UserError(f"{path} has no record {number}", f"They are numbered from 1 to {last:,}.")


def _numbers(record: Any) -> set[int]:
    """The rows of a tree put together from single messages."""
    numbers, stack = set(), [record["prompt"]] if isinstance(record, dict) and "prompt" in record else []
    while stack:
        node = stack.pop()
        numbers.add(node.get("_number"))
        stack.extend(node.get("replies") or [])
    return numbers


def _described(item: Item, config: PrepareSettings, tokenizer: ChatTokenizer, ends: int | None) -> dict[str, Any]:
    if item.record is BLANK:
        return {"raw": "", "skipped": {"reason": BLANK.reason, "detail": ""}, "conversations": []}
    tally = FieldTally(line=item.number)
    record = renamed(item.record, config.columns, tally)
    found = convert(record, "", tally)
    left_out = list(tally.left_out)
    tally.end_record(used=not isinstance(found, Fault))
    raw = item.record.raw.decode("utf-8", "backslashreplace") if isinstance(item.record, Fault) else item.record
    out: dict[str, Any] = {"raw": _plain(raw), "format": format_of(record), "fields": tally.totals()}
    if isinstance(found, Fault):
        return {**out, "skipped": {"reason": found.reason, "detail": found.detail}, "conversations": []}
    conversations = found.conversations if isinstance(found, Tree) else [found]
    discarded = dict(found.discarded) if isinstance(found, Tree) else {}
    shown = [_conversation(conversation, config, tokenizer, ends) for conversation in conversations]
    return {**out, "messages_left_out": left_out, "paths_discarded": discarded, "conversations": shown}


def _plain(value: Any) -> Any:
    """A record as JSON data; a table's value that JSON has no form for as text."""
    return json.loads(json.dumps(value, default=str, ensure_ascii=False))


def _conversation(
    conversation: Conversation, config: PrepareSettings, tokenizer: ChatTokenizer, ends: int | None
) -> dict[str, Any]:
    messages = []
    for message in conversation.messages:
        rest = {name: value for name, value in message._asdict().items() if name not in (*PLAIN_FIELDS, "supervise")}
        shown = {name: _plain(value) for name, value in rest.items() if value}
        fixed = {"role": message.role, "content": message.content, "supervised": is_supervised(message)}
        messages.append({**fixed, **shown})
    block, refused = tokenizer.render_valid([conversation])
    samples, rendered = [], []
    for start, stop in pairwise(block.message_offsets[block.conversation_offsets].tolist()):
        count = stop - start
        first = count if ends is None else ends
        left_out = max(0, count - 2 * first)
        kept = np.delete(np.arange(start, stop), slice(first, first + left_out))
        pairs = zip(block.ids[kept].tolist(), block.mask[kept].tolist(), strict=True)
        samples.append({"tokens": count, "supervised": int(block.mask[start:stop].sum()), "left_out": left_out})
        rendered.append(
            [
                {"id": token, "text": tokenizer.token_bytes(token).decode("utf-8", "replace"), "supervised": bool(mask)}
                for token, mask in pairs
            ]
        )
    long = any(sample["tokens"] > config.seq_length for sample in samples)
    return {
        "id": conversation.id,
        "tools": [json.loads(tool) for tool in conversation.tools],
        "messages": messages,
        "refused": next(iter(refused.values()), None),
        "longer_than_seq_length": config.overlong if long else None,
        "samples": samples,
        "rendered": rendered,
    }


def render_record(
    description: dict[str, Any], tokenizer: ChatTokenizer, table: bool, whole: bool = False
) -> list[Text]:
    """The description as coloured lines, in the colours of samples: green is supervised, magenta a special token; with
    `table` also a line for each token. Of long texts and lists beginning and end, unless `whole`."""
    out = []
    for record in description["records"]:
        out.append(Text(f"{description['file']}:{description['line']}", style="bold"))
        if description["columns"]:
            out.append(Text(f"columns: {described(description['columns'])}"))
        raw = (
            record["raw"] if isinstance(record["raw"], str) else json.dumps(record["raw"], indent=1, ensure_ascii=False)
        )
        out += [Text("── raw", style="cyan"), _ends(raw, whole)]
        if "skipped" in record:
            skipped = record["skipped"]
            out.append(Text(f"── skipped: {skipped['reason']}: {skipped['detail']}".rstrip(": "), style="bold red"))
            continue
        fields = ", ".join(f"{sort}: {' '.join(names)}" for sort, names in record["fields"].items())
        out.append(Text(f"── {record['format']}; fields {fields}", style="cyan"))
        for what in ("messages_left_out", "paths_discarded"):
            out += [Text(f"{what.replace('_', ' ')}: {record[what]}")] if record[what] else []
        numbered = list(enumerate(record["conversations"], 1))
        parts = [_rendered(conversation, number, tokenizer, table, whole) for number, conversation in numbered]
        out += [line for part in _few(parts, "conversations", whole) for line in part]
    return out


def _ends(text: str, whole: bool, style: str = "") -> Text:
    """A text, or beginning and end of a long one."""
    left_out = len(text) - 2 * SHOWN_CHARACTERS
    if whole or left_out <= 0:
        return Text(text, style=style)
    shown = Text(text[:SHOWN_CHARACTERS], style=style)
    shown.append(f" ── {left_out:,} characters left out (--whole shows them) ── ", style="cyan")
    return shown.append(text[-SHOWN_CHARACTERS:], style=style)


def _few(parts: list[list[Text]], what: str, whole: bool) -> list[list[Text]]:
    """The lines of each item of a list, or of the first and the last of a long one."""
    left_out = len(parts) - 2 * SHOWN_ITEMS
    if whole or left_out <= 0:
        return parts
    note = [Text(f"── {left_out:,} {what} left out (--whole shows them)", style="cyan")]
    return [*parts[:SHOWN_ITEMS], note, *parts[-SHOWN_ITEMS:]]


def _rendered(
    conversation: dict[str, Any], number: int, tokenizer: ChatTokenizer, table: bool, whole: bool
) -> list[Text]:
    name = f", id {conversation['id']!r}" if conversation["id"] else ""
    out = [Text(f"── conversation {number}: {len(conversation['messages'])} messages{name}", style="cyan")]
    tools = [[_ends(f"tool: {json.dumps(tool, ensure_ascii=False)}", whole)] for tool in conversation["tools"]]
    messages = [[_message(message, whole)] for message in conversation["messages"]]
    out += [line for part in (*_few(tools, "tools", whole), *_few(messages, "messages", whole)) for line in part]
    if conversation["refused"] is not None:
        return [*out, Text(f"── the template does not take it: {conversation['refused']}", style="bold red")]
    for sample, tokens in zip(conversation["samples"], conversation["rendered"], strict=True):
        long = conversation["longer_than_seq_length"]
        more = f"; longer than seq_length: {long}" if long else ""
        counts = f"{sample['tokens']:,} tokens, {sample['supervised']:,} supervised"
        out.append(Text(f"── {counts}{more}", style="cyan"))
        left_out = sample["left_out"]
        half = len(tokens) // 2 if left_out else len(tokens)
        out += _tokens(tokens[:half], tokenizer, table)
        if left_out:
            out.append(Text(f"── {left_out:,} tokens left out (--whole shows them)", style="cyan"))
            out += _tokens(tokens[half:], tokenizer, table)
    return out


def _message(message: dict[str, Any], whole: bool) -> Text:
    line = Text(f"{message['role']}{', supervised' if message['supervised'] else ''}: ", style="bold")
    rest = {name: value for name, value in message.items() if name not in (*PLAIN_FIELDS, "supervised")}
    line.append_text(_ends(message["content"], whole, "default"))
    return line.append_text(_ends(f"  {json.dumps(rest, ensure_ascii=False)}", whole, "dim")) if rest else line


def _tokens(tokens: list[dict[str, Any]], tokenizer: ChatTokenizer, table: bool) -> list[Text]:
    rows = tokens if table else []
    lines = [f"{t['id']:>7} {'supervised' if t['supervised'] else '':<10} {t['text']!r}" for t in rows]
    return [coloured(tokens, tokenizer), *map(Text, lines)]
