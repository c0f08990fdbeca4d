"""`lumina inspect --line`: one record of a file, from what stands there to the tokens that training gets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

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


def describe_record(path: str, number: int, config: PrepareSettings, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """What becomes of the record `number` of a file, as accounts count them (a line of JSON lines, from 1; of single
    OASST messages the tree that the message is in): the raw record, its format, the reason why it is skipped, fields by
    sort, and its conversations with the messages, ids and mask that training's reader and template make of them.

    Raises:
        UserError: there is no such record, or a column is mapped that the file has not.
    """
    (file,) = check_inputs([path])
    layout = detect(str(file))
    if config.columns:
        check_columns(str(file), layout, config.columns)
        layout = layout._replace(flat=False)
    items = list(_items_at(str(file), layout, number))
    records = [_described(item, config, tokenizer) for item in items]
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


def _described(item: Item, config: PrepareSettings, tokenizer: ChatTokenizer) -> dict[str, Any]:
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
    shown = [_conversation(conversation, config, tokenizer) for conversation in conversations]
    return {**out, "messages_left_out": left_out, "paths_discarded": discarded, "conversations": shown}


def _plain(value: Any) -> Any:
    """A record as JSON data; a table's value that JSON has no form for as text."""
    return json.loads(json.dumps(value, default=str, ensure_ascii=False))


def _conversation(conversation: Conversation, config: PrepareSettings, tokenizer: ChatTokenizer) -> dict[str, Any]:
    messages = []
    for message in conversation.messages:
        rest = {name: value for name, value in message._asdict().items() if name not in (*PLAIN_FIELDS, "supervise")}
        shown = {name: _plain(value) for name, value in rest.items() if value}
        fixed = {"role": message.role, "content": message.content, "supervised": is_supervised(message)}
        messages.append({**fixed, **shown})
    block, refused = tokenizer.render_valid([conversation])
    samples = []
    for start, stop in pairwise(block.message_offsets[block.conversation_offsets].tolist()):
        pairs = zip(block.ids[start:stop].tolist(), block.mask[start:stop].tolist(), strict=True)
        samples.append(
            [
                {"id": token, "text": tokenizer.token_bytes(token).decode("utf-8", "replace"), "supervised": bool(mask)}
                for token, mask in pairs
            ]
        )
    long = any(len(sample) > config.seq_length for sample in samples)
    return {
        "id": conversation.id,
        "tools": [json.loads(tool) for tool in conversation.tools],
        "messages": messages,
        "refused": next(iter(refused.values()), None),
        "longer_than_seq_length": config.overlong if long else None,
        "rendered": samples,
    }


def render_record(description: dict[str, Any], tokenizer: ChatTokenizer, table: bool) -> list[Text]:
    """The description as coloured lines, in the colours of samples: green is supervised, magenta a special token; with
    `table` also a line for each token."""
    out = []
    for record in description["records"]:
        out.append(Text(f"{description['file']}:{description['line']}", style="bold"))
        if description["columns"]:
            out.append(Text(f"columns: {described(description['columns'])}"))
        raw = (
            record["raw"] if isinstance(record["raw"], str) else json.dumps(record["raw"], indent=1, ensure_ascii=False)
        )
        out += [Text("── raw", style="cyan"), Text(raw)]
        if "skipped" in record:
            skipped = record["skipped"]
            out.append(Text(f"── skipped: {skipped['reason']}: {skipped['detail']}".rstrip(": "), style="bold red"))
            continue
        fields = ", ".join(f"{sort}: {' '.join(names)}" for sort, names in record["fields"].items())
        out.append(Text(f"── {record['format']}; fields {fields}", style="cyan"))
        for what in ("messages_left_out", "paths_discarded"):
            out += [Text(f"{what.replace('_', ' ')}: {record[what]}")] if record[what] else []
        for number, conversation in enumerate(record["conversations"], 1):
            out += _rendered(conversation, number, tokenizer, table)
    return out


def _rendered(conversation: dict[str, Any], number: int, tokenizer: ChatTokenizer, table: bool) -> list[Text]:
    name = f", id {conversation['id']!r}" if conversation["id"] else ""
    out = [Text(f"── conversation {number}: {len(conversation['messages'])} messages{name}", style="cyan")]
    out += [Text(f"tool: {json.dumps(tool, ensure_ascii=False)}") for tool in conversation["tools"]]
    for message in conversation["messages"]:
        line = Text(f"{message['role']}{', supervised' if message['supervised'] else ''}: ", style="bold")
        rest = {name: value for name, value in message.items() if name not in (*PLAIN_FIELDS, "supervised")}
        line.append(message["content"], style="default")
        line.append(f"  {json.dumps(rest, ensure_ascii=False)}" if rest else "", style="dim")
        out.append(line)
    if conversation["refused"] is not None:
        return [*out, Text(f"── the template does not take it: {conversation['refused']}", style="bold red")]
    for tokens in conversation["rendered"]:
        supervised = sum(token["supervised"] for token in tokens)
        long = conversation["longer_than_seq_length"]
        more = f"; longer than seq_length: {long}" if long else ""
        out.append(Text(f"── {len(tokens):,} tokens, {supervised:,} supervised{more}", style="cyan"))
        out.append(coloured(tokens, tokenizer))
        if table:
            out += [Text(f"{t['id']:>7} {'supervised' if t['supervised'] else '':<10} {t['text']!r}") for t in tokens]
    return out
