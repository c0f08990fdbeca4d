"""`{"question" or "query", "answer", "context"?}`: one question and its answer."""

from __future__ import annotations

from lumina.data.formats._format import DataFormat, has
from lumina.data.records.questions import from_instruction, has_answer

_asks = has("question", "query")

FORMAT = DataFormat(
    "question and answer",
    from_instruction,
    recognise=((70, lambda record: _asks(record) and has_answer(record)),),
    required=_asks,
)
