"""`lumina validate-data --fix`: valid records as JSON lines of messages, the rest beside them with their reasons."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from lumina.chat import TEXT_ROLE, Conversation
from lumina.config import UserError
from lumina.data.converting.columns import Columns, renamed
from lumina.data.formats import convert
from lumina.data.reading.items import read_items
from lumina.data.reading.layout import detect
from lumina.data.reading.paths import check_inputs
from lumina.data.records.fault import BLANK, Fault, Tree
from lumina.data.records.fields import FieldTally
from lumina.files import atomic_file, real_path


def write_fixed(paths: Sequence[str], out: Path, columns: Columns | None = None) -> tuple[int, int, Path]:
    """Writes valid records as messages JSON lines to `out`, and what is not, with its reason, to a file beside it.
    `columns`: in which columns the formats' fields stand.

    Returns (conversations written, records rejected, the rejects' path). Both files appear when whole.
    """
    files = check_inputs(paths)
    rejects = out.with_name(out.name + ".rejected.jsonl")
    if any(real_path(path) in (real_path(out), real_path(rejects)) for path in files):
        raise UserError(f"{out} is one of the inputs", "Name another file after --fix.")
    written = rejected = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_file(out) as scratch_out,
        atomic_file(rejects) as scratch_rejects,
        scratch_out.open("wb") as good,
        scratch_rejects.open("wb") as bad,
    ):
        for path in files:
            layout = detect(str(path))
            if columns:
                layout = layout._replace(flat=False)
            for item in read_items(str(path), layout):
                if item.record is BLANK:
                    continue
                found = convert(renamed(item.record, columns or {}, FieldTally()))
                if isinstance(found, Fault):
                    bad.write(orjson.dumps(_reject(path, item.number, found, item.record)) + b"\n")
                    rejected += 1
                    continue
                for conversation in found.conversations if isinstance(found, Tree) else [found]:
                    good.write(orjson.dumps(_valid(conversation)) + b"\n")
                    written += 1
    return written, rejected, rejects


def _valid(conversation: Conversation) -> dict[str, Any]:
    """The canonical record of a conversation: reading it again gives the same one."""
    conversation_id = {"id": conversation.id} if conversation.id else {}
    if conversation.messages[0].role == TEXT_ROLE:
        return {**conversation_id, "text": conversation.messages[0].content}
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        entry: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            entry["reasoning_content"] = message.reasoning
        if message.tool_calls:
            entry["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        entry |= {key: value for key, value in (("name", message.name), ("tool_call_id", message.call_id)) if value}
        if message.masked:
            entry["train_detail"] = [
                {"begin_offset": start, "end_offset": end - 1, "train": False} for start, end in message.masked
            ]
        messages.append(entry if message.supervise else {**entry, "weight": 0})
    tools = {"tools": [json.loads(tool) for tool in conversation.tools]} if conversation.tools else {}
    return {**conversation_id, "messages": messages, **tools}


def _reject(path: Path, number: int, fault: Fault, record: Any) -> dict[str, Any]:
    """A rejected record with its place and reason; what was no JSON goes in as text."""
    held = fault.raw.decode("utf-8", "backslashreplace") if isinstance(record, Fault) else record
    entry = {"source": f"{path}:{number}", "reason": fault.reason, "detail": fault.detail, "record": held}
    try:
        orjson.dumps(entry)
    except (TypeError, orjson.JSONEncodeError):  # a Parquet value that JSON has no form for
        entry["record"] = repr(held)
    return entry
