"""`{"instruction", "input"?, "output", "history"?}`: Alpaca's format, and Dolly's with `context` and `response`."""

from __future__ import annotations

from lumina.data.formats._format import DataFormat, asks, has
from lumina.data.records.questions import from_instruction

FORMAT = DataFormat("Alpaca", from_instruction, recognise=((60, has("instruction")),), required=asks("instruction"))
