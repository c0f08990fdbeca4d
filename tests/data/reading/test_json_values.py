"""Files of JSON in any layout, and tables, are read to their end."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.config import UserError
from lumina.data import prepare
from lumina.data.account import Account
from lumina.data.reading import streams
from lumina.data.reading.items import read_items
from lumina.data.reading.json_values import parse_json
from lumina.data.reading.layout import detect
from lumina.data.reading.paths import expand
from lumina.data.records.fault import BLANK, Fault
from tests.data.helpers import TOKENIZER, Settings, chat

RECORDS = [{**chat("q", f"answer {i}"), "id": str(i)} for i in range(7)]


def items(path: Path) -> list[Any]:
    found = (item.record for item in read_items(str(path), detect(str(path))))
    return [record for record in found if record is not BLANK]


def line(value: Any) -> str:
    return json.dumps(value)


def pretty(value: Any) -> str:
    return json.dumps(value, indent=2)


LAYOUTS = {
    "two arrays": pretty(RECORDS[:3]) + "\n" + pretty(RECORDS[3:]),
    "two arrays of one line": line(RECORDS[:3]) + line(RECORDS[3:]),
    "arrays line by line": line(RECORDS[:2]) + "\n" + line(RECORDS[2:4]) + "\n" + line(RECORDS[4:]) + "\n",
    "an array, then lines": pretty(RECORDS[:3]) + "\n" + "\n".join(map(line, RECORDS[3:])) + "\n",
    "an array of one line, then lines": line(RECORDS[:3]) + "\n" + "\n".join(map(line, RECORDS[3:])),
    "pretty-printed objects": "\n".join(map(pretty, RECORDS)),
    "pretty-printed objects with commas": ",\n".join(map(pretty, RECORDS)),
    "objects without line ends": "".join(map(line, RECORDS)),
    "wrapped": pretty({"data": RECORDS}),
    "wrapped in one line": line({"data": RECORDS}),
    "wrapped beside others": pretty({"version": "1.0", "data": RECORDS}),
    "wrapped before others": pretty({"data": RECORDS, "version": "1.0"}),
    "texts of JSON": "\n".join(line(line(record)) for record in RECORDS),
}


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_json_in_any_layout_is_read_to_its_end(
    tmp_path: Path, layout: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "READ_BYTES", chunk)
    path = tmp_path / "data.json"
    path.write_text(LAYOUTS[layout])
    assert items(path) == RECORDS


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
@pytest.mark.parametrize("packed", [False, True])
def test_wide_encodings_are_read(tmp_path: Path, encoding: str, packed: bool) -> None:
    records = [chat("q", f"Löwe 🦁 {i}") for i in range(3)]
    data = "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode(encoding)
    path = tmp_path / "data.jsonl"
    path.write_bytes(gzip.compress(data) if packed else data)
    assert items(path) == records


@pytest.mark.parametrize("layout", ["lines", "array", "one chat"])
def test_lists_of_messages_are_conversations(tmp_path: Path, layout: str) -> None:
    chats = [record["messages"] for record in RECORDS]
    text = {"lines": "\n".join(map(line, chats)), "array": pretty(chats), "one chat": pretty(chats[0])}[layout]
    (tmp_path / "d.json").write_text(text)
    expected = chats[:1] if layout == "one chat" else chats
    assert items(tmp_path / "d.json") == [{"messages": one} for one in expected]


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_tables_are_read_by_their_headers(tmp_path: Path, delimiter: str) -> None:
    rows = [{"instruction": f'say "{i}",\tthen\nmore', "output": "x" * 200_000, "system": ""} for i in range(3)]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    path = tmp_path / ("d.csv" if delimiter == "," else "d.tsv")
    path.write_text(out.getvalue() + f"only{delimiter}two\r\n", newline="")
    found = items(path)
    assert found[:-1] == [{**row, "system": None} for row in rows]  # an empty field is none
    assert isinstance(found[-1], Fault)
    table = detect(str(path)).describe()
    assert table == path.suffix[1:].upper()


def test_a_table_of_conversations_in_json(tmp_path: Path) -> None:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["id", "messages"])
    writer.writerows([record["id"], json.dumps(record["messages"])] for record in RECORDS)
    (tmp_path / "d.csv").write_text(out.getvalue(), newline="")
    account = Account.from_dict(prepare([tmp_path / "d.csv"], Settings(), TOKENIZER).account)
    assert account.conversations == len(RECORDS)


def test_arrow_streams_and_saved_data_sets(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    folder = tmp_path / "saved"
    folder.mkdir()
    for name, part in (("data-0.arrow", table.slice(0, 4)), ("data-1.arrow", table.slice(4))):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, part.schema) as writer:
            writer.write_table(part)
    state = {"_data_files": [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    files = expand([str(folder)])
    assert [record for file in files for record in items(Path(file))] == RECORDS
    (tmp_path / "both").mkdir()
    (tmp_path / "both/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(UserError, match="both/train or"):
        expand([str(tmp_path / "both")])


def test_not_a_number_costs_nothing_where_nobody_uses_it(tmp_path: Path) -> None:
    text = "\n".join(line({**record, "score": float("nan") if i % 2 else 0.5}) for i, record in enumerate(RECORDS))
    (tmp_path / "d.jsonl").write_text(text)
    (tmp_path / "d.json").write_text("[" + text.replace("\n", ",\n") + "]")
    for name in ("d.jsonl", "d.json"):
        account = Account.from_dict(prepare([tmp_path / name], Settings(), TOKENIZER).account)
        assert account.conversations == len(RECORDS)
    (tmp_path / "bad.jsonl").write_text(line(RECORDS[0]) + '\n{"messages": [{"role": "user", "content": NaN}]}')
    assert Account.from_dict(prepare([tmp_path / "bad.jsonl"], Settings(), TOKENIZER).account).faults.keys() == {
        "wrong type"
    }


def test_what_cannot_be_read_is_named_and_what_follows_is_read(tmp_path: Path) -> None:
    broken = "\n".join([pretty(RECORDS[0]), '{\n  "messages": [,\n', pretty(RECORDS[1]), line(RECORDS[2])])
    (tmp_path / "d.json").write_text(broken)
    found = items(tmp_path / "d.json")
    assert [record for record in found if not isinstance(record, Fault)] == RECORDS[:3]
    assert [record.reason for record in found if isinstance(record, Fault)] == ["broken JSON"]
    (tmp_path / "py.jsonl").write_text(f"{RECORDS[0]}\n{RECORDS[1]}\n")
    assert {record.reason for record in items(tmp_path / "py.jsonl")} == {"a Python literal, not JSON"}
    (tmp_path / "w.json").write_text(pretty({"data": RECORDS, "system": "be brief"}))
    assert items(tmp_path / "w.json")[-1].reason == "field not used: system"


def test_lines_with_several_records_keep_the_lines_numbers(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(line(RECORDS[:2]) + "\n" + line([RECORDS[2], {"odd": 1}]) + "\n[]\nnot json\n")
    account = Account.from_dict(prepare([tmp_path / "d.jsonl"], Settings(), TOKENIZER).account)
    account.check()
    assert (account.conversations, account.lines) == (3, 6)
    places = {reason: entry.first for reason, entry in account.faults.items()}
    path = tmp_path / "d.jsonl"
    assert places == {"unknown format": [f"{path}:2"], "empty": [f"{path}:3"], "broken JSON": [f"{path}:4"]}


DRAWN = st.tuples(st.integers(0, 6), st.sampled_from(["line", "pretty", "array", "pretty array", "wrapped"]))


@settings(max_examples=150, deadline=None)
@given(st.lists(DRAWN, min_size=1, max_size=8), st.sampled_from(["\n", "\n\n", " \r\n"]), st.integers(3, 400))
def test_drawn_layouts_give_every_record(drawn: list[tuple[int, str]], between: str, chunk: int) -> None:
    import tempfile

    expected: list[Any] = []
    parts = []
    for number, layout in drawn:
        own = RECORDS[number : number + 2]
        record = RECORDS[number]
        expected += [record] if layout in ("line", "pretty") else own
        parts.append(
            {
                "line": line(record),
                "pretty": pretty(record),
                "array": line(own),
                "pretty array": pretty(own),
                "wrapped": pretty({"data": own}),
            }[layout]
        )
    with tempfile.NamedTemporaryFile(suffix=".json") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "READ_BYTES", chunk)
        file.write(between.join(parts).encode())
        file.flush()
        found = items(Path(file.name))
    assert [orjson.dumps(record) if not isinstance(record, Fault) else record for record in found] == [
        orjson.dumps(record) for record in expected
    ]


def test_after_broken_text_reading_goes_on_beside_it_not_inside_it(tmp_path: Path) -> None:
    """What stands deeper than the broken value is a part of it; the other elements of its array are read."""
    elements = [pretty(record) for record in RECORDS]
    elements[2] = '{\n  "messages": [,\n    {\n      "text": "a part"\n    }\n  ]\n}'
    for text in ("\n".join(elements), "[\n" + ",\n".join(elements) + "\n]"):
        (tmp_path / "d.json").write_text(text)
        found = items(tmp_path / "d.json")
        assert [record for record in found if not isinstance(record, Fault)] == RECORDS[:2] + RECORDS[3:]
        assert sum(isinstance(record, Fault) for record in found) == 1
    (tmp_path / "d.json").write_text("[" + ("\n" * 100_000) + "{broken" + ("\n" * 100_000) + "]")
    assert items(tmp_path / "d.json")  # in linear time: the pattern that looked for the next line was quadratic


def test_layouts_of_other_exporters(tmp_path: Path) -> None:
    layouts = [
        '{"data": [\n' + ",\n".join(map(line, RECORDS)) + "\n]}",  # records that are not indented
        ",\n".join(map(line, RECORDS)),
        ", ".join(map(line, RECORDS)),
        line({"count": 7, "description": "chats", "data": RECORDS}),
        pretty({"data": RECORDS, "description": "chats"}),
        "\n".join("\ufeff" + line(record) for record in RECORDS),
    ]
    for text in layouts:
        (tmp_path / "d.json").write_text(text)
        assert items(tmp_path / "d.json") == RECORDS, text[:40]
    alpaca = [{"instruction": "q", "output": "a", "from": "somewhere"}] * 3
    (tmp_path / "d.json").write_text(pretty(alpaca))
    assert items(tmp_path / "d.json") == alpaca  # a source named `from` makes no turn


def test_tables_whose_rows_cannot_be_told_apart_are_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('prompt,response\nq,a\nq1,"He said "hi" ok\nHello, world\n')
    assert [getattr(record, "reason", record) for record in items(tmp_path / "d.csv")] == [
        {"prompt": "q", "response": "a"},
        "broken CSV",
        "broken CSV",
    ]
    (tmp_path / "d.csv").write_text("prompt,prompt,response\nq,r,a\n")
    assert [record.reason for record in items(tmp_path / "d.csv")] == ["broken CSV"]


def test_what_is_nested_too_deep_is_a_fault(tmp_path: Path) -> None:
    deep = "[" * 700 + "1" + "]" * 700
    (tmp_path / "d.jsonl").write_text(f'{line(RECORDS[0])}\n{deep}\n{{"messages": [], "tools": {deep}}}\n')
    account = Account.from_dict(prepare([tmp_path / "d.jsonl"], Settings(), TOKENIZER).account)
    account.check()
    assert (account.conversations, account.bad_lines) == (1, 2)


@pytest.mark.parametrize("rest", ['"meta": {oops', '"meta": ' + '{"a":' * 5000, '"meta": [1 2]}', '"meta": "open'])
def test_what_breaks_after_the_records_of_an_object_costs_that_alone(tmp_path: Path, rest: str) -> None:
    """Reading goes on at the next line that begins a value, and the rest of the file is not scanned at every chunk."""
    many = 20_000
    path = tmp_path / "d.json"
    text = '{"data": [\n' + line(chat("q", "a")) + ",\n" + line(chat("b", "c")) + "], " + rest
    path.write_text("\n".join([text, *(line(chat("d", str(number))) for number in range(many))]))
    found = items(path)
    assert sum(isinstance(record, Fault) for record in found) == 1
    if "open" not in rest:
        assert len(found) == many + 3


TWICE_IN = [
    b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "content": "b"}]}',
    b'{"prompt": "q", "completion": "a", "completion": "b"}',
    b'{"prompt" : "q", "completion" : "a", "completion" : "b"}',
    b'{"prompt": "a \\": b", "completion": "a", "completion": "b"}',
    b'{"prompt": "q", "completion": "a", "meta": {"k": {"text": 1, "text": 2}}}',
    b'{"prompt": "q", "completion": NaN, "completion": "b"}',
]
ONCE_IN = [
    b'{"prompt": "q", "completion": "a", "completion": "a"}',
    b'{"id": 1, "prompt": "q", "completion": "a", "id": 2}',
    b'{"prompt": "say \\": twice \\":", "completion": "a\\\\", "k\\\\": {"a": {"b": [{"c": 1}, 2, [{"d": 1}]]}}}',
    b'{"a" : [{"b":1}, "text"], "c": [1, {"d": {"e": 1}}], "prompt": "q", "completion": "a"}',
]


@pytest.mark.parametrize("text", TWICE_IN)
def test_a_key_with_two_values_is_not_read_as_the_last_one(text: bytes) -> None:
    found = parse_json(text)
    assert isinstance(found, Fault)
    assert found.reason == "two fields for one thing"


@pytest.mark.parametrize("text", ONCE_IN)
def test_keys_that_stand_twice_and_lose_nothing(text: bytes) -> None:
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be"])
def test_what_is_no_character_in_a_wide_encoding_is_a_bad_line(tmp_path: Path, encoding: str) -> None:
    lines = [line(chat("q", f"answer {i}")) for i in range(3)]
    lines[1] = lines[1].replace("answer", "\ud83d")
    path = tmp_path / "data.jsonl"
    text = "".join(one + "\n" for one in lines)
    path.write_bytes(text.encode(encoding, "surrogatepass") + b"\n")  # a byte too many at the end
    found = items(path)
    assert [isinstance(item, Fault) for item in found] == [False, True, False, True]
    assert not any("\ufffd" in str(item) for item in found)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bz2.compress(b"{}"), "packed with bzip2"),
        (lzma.compress(b"{}"), "packed with xz"),
        (b"PK\x03\x04rest", "a zip archive"),
        (pickle.dumps([RECORDS]), "a pickle"),
        (b"SQLite format 3\0", "an SQLite database"),
    ],
)
def test_containers_that_are_not_read_are_named(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "data.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=said):
        detect(str(tmp_path / "data.jsonl"))


@pytest.mark.parametrize("zeros", [1, 2, 3, 4, 4096])
def test_zeros_before_a_text_are_no_encoding(tmp_path: Path, zeros: int) -> None:
    """A crash leaves blocks of zeros: the line that they are in is bad, those after it are read."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\0" * zeros + "\n".join(map(line, RECORDS)).encode())
    found = items(path)
    assert isinstance(found[0], Fault)
    assert found[1:] == RECORDS[1:]
