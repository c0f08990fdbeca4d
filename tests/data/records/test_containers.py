"""Whole data sets in one JSON object: refused, with the command that makes records of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from lumina.config import UserError
from lumina.data import Fault, convert, prepare
from lumina.data.records.containers import container_remedy
from tests.data.helpers import TOKENIZER, Settings, chat

RECORDS = [chat("q", "a"), chat("b", "c")]


@pytest.mark.parametrize(
    ("whole", "said"),
    [
        ({"data": {"train": RECORDS, "test": RECORDS}}, r"jq -c '\.data\.train\[\]' FILE"),
        ({"test": RECORDS, "train": RECORDS}, r"jq -c '\.test\[\]' FILE"),
        ({"version": 1, "items": RECORDS}, r"jq -c '\.items\[\]' FILE"),
        ({"prompt": ["a", "b"], "response": ["c", "d"]}, r"a list for each column \(prompt, response\)"),
        ({"messages": [r["messages"] for r in RECORDS], "id": [1, 2]}, r"a list for each column \(messages\)"),
        ({"a17": RECORDS[0], "a18": RECORDS[1]}, r"records by their ids \('a17', …\): jq -c '\.\[\]' FILE"),
        ({"0": {"instruction": "i", "output": "o"}}, r"records by their ids \('0', …\)"),
    ],
)
def test_a_data_set_that_is_no_record_is_refused_with_the_remedy(
    tmp_path: Path, whole: dict[str, Any], said: str
) -> None:
    path = tmp_path / "whole.json"
    path.write_bytes(orjson.dumps(whole, option=orjson.OPT_INDENT_2))
    with pytest.raises(UserError, match=said):
        prepare([path], Settings(), TOKENIZER)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user"}]},
        {"prompt": [{"role": "user", "content": 3}], "response": "a"},
        {"prompt": ["a"], "response": "b"},
        {"role": "user", "content": "x"},
        {"id": 7, "meta": {"tags": ["a"]}},
        {},
    ],
)
def test_a_faulty_record_keeps_its_own_reason(record: dict[str, Any]) -> None:
    assert container_remedy(record) is None
    assert isinstance(convert(record), Fault)
