"""`{"prompt", "response" or "completion"}`: TRL's prompt and completion, texts or lists of messages."""

from __future__ import annotations

from lumina.data.formats._format import DataFormat, asks
from lumina.data.records.questions import from_instruction, has_answer

_asks = asks("prompt")

FORMAT = DataFormat(
    "prompt and response",
    from_instruction,
    recognise=((30, lambda record: _asks(record) and has_answer(record)),),
    required=_asks,
)
