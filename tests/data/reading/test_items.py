"""Every format and container reads as the same conversations; what breaks is counted where it breaks."""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.chat import Conversation, Message
from lumina.config import UserError
from lumina.data import prepare
from lumina.data.account import Account
from lumina.data.formats import convert, format_of
from lumina.data.reading import streams
from lumina.data.reading.items import read_items
from lumina.data.reading.layout import detect
from lumina.data.reading.paths import expand
from lumina.data.reading.streams import read_lines
from lumina.data.records.fault import Fault, Tree
from tests.data.helpers import TOKENIZER, Settings, chat, write_jsonl
from tests.runs import clean_environment

USER, ANSWER, SYSTEM = Message("user", "q"), Message("assistant", "a"), Message("system", "s")


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("messages", chat("q", "a"), [USER, ANSWER]),
        (
            "messages",
            {"messages": [{"role": "prompter", "content": "q"}, {"role": "bot", "content": "a"}]},
            [USER, ANSWER],
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "human", "content": [{"type": "text", "text": "q"}]},
                    {"role": "ai", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                ]
            },
            [USER, Message("assistant", "ab")],
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": "a", "weight": 0}, {"role": "assistant", "content": "a"}]},
            [Message("assistant", "a", supervise=False), ANSWER],
        ),
        (
            "ShareGPT",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            [SYSTEM, USER, ANSWER],
        ),
        (
            "ShareGPT",
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "call"},
                    {"from": "tool", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            [SYSTEM, USER, Message("assistant", "call"), Message("tool", "q"), ANSWER],
        ),
        ("Alpaca", {"instruction": "q", "input": "", "output": "a"}, [USER, ANSWER]),
        ("Alpaca", {"instruction": "do", "input": "this", "output": "a"}, [Message("user", "do\n\nthis"), ANSWER]),
        ("prompt and response", {"prompt": "q", "response": "a"}, [USER, ANSWER]),
        ("prompt and response", {"prompt": "q", "completion": "a"}, [USER, ANSWER]),
        (
            "prompt and response",
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            [USER, ANSWER],
        ),
        ("text", {"text": "t"}, [Message("text", "t")]),
        # Parquet fills the columns a row lacks with null.
        ("Alpaca", {"messages": None, "instruction": "q", "input": None, "output": "a", "text": None}, [USER, ANSWER]),
    ],
)
def test_each_format_is_named_and_read(name: str, record: dict[str, Any], expected: list[Message]) -> None:
    found = convert(record)
    assert isinstance(found, Conversation), found
    assert list(found.messages) == expected
    assert format_of(record) == name


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": "x"}, "wrong type"),
        ({"conversations": ["x"]}, "wrong type"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown role"),
        ({"conversations": [{"from": "gpt"}]}, "wrong type"),
        ({"instruction": 3, "output": "a"}, "wrong type"),
        ({"instruction": "q"}, "wrong type"),
        ({"instruction": "q", "output": ""}, "empty"),
        ({"prompt": "q", "response": 3}, "wrong type"),
        ({"prompt": "q", "response": ""}, "empty"),
        ({"text": " "}, "empty"),
        ({"text": 1}, "wrong type"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "no assistant turn"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "field not used: content of type image_url",
        ),
        (None, "wrong type"),
        (7, "wrong type"),
        ({}, "unknown format"),
    ],
)
def test_what_no_format_takes_is_a_fault(record: Any, reason: str) -> None:
    found = convert(record)
    assert isinstance(found, Fault)
    assert found.reason == reason


RECORDS = [chat("q", f"answer {i}") for i in range(1500)]


def write_container(folder: Path, container: str) -> Path:
    path = folder / "data"
    lines = b"".join(orjson.dumps(record) + b"\n" for record in RECORDS)
    if container == "jsonl":
        path.write_bytes(lines)
    elif container == "jsonl with byte order mark":
        path.write_bytes(b"\xef\xbb\xbf" + lines)
    elif container == "gzip":
        path.write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]))  # two members, as log rotation does
    elif container == "zstd":
        with pa.output_stream(str(path), compression="zstd") as out:
            out.write(lines)
    elif container == "array":
        path.write_bytes(orjson.dumps(RECORDS))
    elif container == "indented array, gzip":
        path.write_bytes(gzip.compress(b" \n" + orjson.dumps(RECORDS, option=orjson.OPT_INDENT_2)))
    elif container == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    else:
        table = pa.Table.from_pylist(RECORDS)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    return path


@pytest.mark.parametrize(
    ("container", "described"),
    [
        ("jsonl", "JSON lines"),
        ("jsonl with byte order mark", "JSON lines"),
        ("gzip", "JSON lines, gzip"),
        ("zstd", "JSON lines, zstd"),
        ("array", "JSON"),
        ("indented array, gzip", "JSON, gzip"),
        ("parquet", "Parquet"),
        ("arrow", "Arrow"),
    ],
)
def test_each_container_gives_every_record_once_in_order(
    tmp_path: Path, container: str, described: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "READ_BYTES", 777)  # so that chunks end inside records
    path = str(write_container(tmp_path, container))
    layout = detect(path)
    assert layout.describe() == described
    items = list(read_items(path, layout))
    assert [item.record for item in items] == RECORDS
    assert [item.number for item in items] == list(range(1, len(RECORDS) + 1))


@given(st.lists(st.sampled_from([b"a", b"\xc3\xa9", b"bb\r", b"", b"c" * 30]), max_size=12), st.integers(1, 20))
def test_byte_ranges_share_the_lines_out_exactly(lines: list[bytes], step: int) -> None:
    import tempfile

    for whole in (b"\n".join(lines), b"\n".join([*lines, b""])):
        with tempfile.NamedTemporaryFile() as file:
            file.write(whole)
            file.flush()
            parts = [
                line
                for start in range(0, max(1, len(whole)), step)
                for line in read_lines(file.name, start, min(start + step, len(whole)))
            ]
        assert parts == whole.splitlines(keepends=True) if b"\r" not in whole else b"".join(parts) == whole


@pytest.mark.parametrize("keep", [1, 30, 31, 50, 2000, 40_000])
def test_a_truncated_array_is_read_up_to_where_it_breaks(tmp_path: Path, keep: int) -> None:
    whole = orjson.dumps(RECORDS)
    path = tmp_path / "cut.json"
    path.write_bytes(whole[:keep])
    items = list(read_items(str(path), detect(str(path))))
    complete = [i for i in range(len(RECORDS)) if len(orjson.dumps(RECORDS[: i + 1])) - 1 <= keep]
    assert [item.record for item in items[:-1]] == RECORDS[: len(complete)]
    assert items[-1].record.reason == "truncated array"
    assert items[-1].number == len(complete) + 1


def test_a_sharegpt_file_with_a_truncated_end_prepares(tmp_path: Path) -> None:
    records = [
        {"id": str(i), "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": f"a {i}"}]}
        for i in range(50)
    ]
    path = tmp_path / "sharegpt.json"
    path.write_bytes(orjson.dumps(records)[:-30])
    account = Account.from_dict(prepare([path], Settings(), TOKENIZER).account)
    account.check()
    assert account.conversations == 49
    assert account.faults["truncated array"].first == [f"{path}:50"]


@pytest.mark.parametrize("container", ["gzip", "zstd"])
def test_a_torn_compressed_file_is_read_up_to_where_it_breaks(tmp_path: Path, container: str) -> None:
    path = write_container(tmp_path, container)
    path.write_bytes(path.read_bytes()[:-1000])
    items = list(read_items(str(path), detect(str(path))))
    assert [item.record for item in items[:-1]] == RECORDS[: len(items) - 1]
    assert len(items) < len(RECORDS)
    assert isinstance(items[-1].record, Fault)
    if container == "gzip":
        assert items[-1].record.reason == "truncated file"


def test_globs_and_several_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        write_jsonl(tmp_path / name, [chat("q", name)])
    dataset = prepare([str(tmp_path / "*.jsonl"), str(tmp_path / "c.txt")], Settings(), TOKENIZER)
    assert [Path(source).name for source in dataset.meta["sources"]] == ["a.jsonl", "b.jsonl", "c.txt"]
    with pytest.raises(UserError, match="does not exist"):
        prepare([str(tmp_path / "*.nothing")], Settings(), TOKENIZER)


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path: Path) -> None:
    odd = write_jsonl(tmp_path / "a[1].jsonl", [chat("q", "a")])
    assert expand([str(odd)]) == [str(odd)]


def test_plain_text_is_supervised_whole(tmp_path: Path) -> None:
    texts = ["one two three", "four"]
    dataset = prepare([write_jsonl(tmp_path / "t", [{"text": text} for text in texts])], Settings(), TOKENIZER)
    assert dataset.num_supervised == sum(len(TOKENIZER.encode(text)) + 1 for text in texts)


def test_trees_convert_to_several() -> None:
    reply = {"message_id": "b", "role": "assistant", "text": "a", "replies": []}
    record = {"prompt": {"message_id": "a", "role": "prompter", "text": "q", "replies": [reply, {**reply, "text": ""}]}}
    found = convert(record)
    assert isinstance(found, Tree)
    assert [list(conversation.messages) for conversation in found.conversations] == [[USER, ANSWER]]
    assert found.discarded == {"empty": 1}


@pytest.mark.parametrize("container", ["parquet", "arrow", "arrow stream"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_damaged_table_is_named_with_the_remedy(tmp_path: Path, container: str, share: float) -> None:
    table = pa.Table.from_pylist([chat(f"question {i}", "answer " * 50) for i in range(2000)])
    path = tmp_path / "data.bin"
    if container == "parquet":
        pq.write_table(table, path)
    else:
        new = pa.ipc.new_file if container == "arrow" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"data\.bin is a (Parquet|Arrow) file that cannot be read: (.|\n)*download it"):
        prepare([path], Settings(), TOKENIZER)


SHORT_OF_MEMORY = """
import re, resource, sys
from pathlib import Path
import pyarrow
from lumina.data.reading.items import read_items
from lumina.data.reading.layout import detect

pyarrow.set_cpu_count(1)
list(read_items(sys.argv[3], detect(sys.argv[3])))  # whose thread is there now
used = int(re.search(r"VmData:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (72 << 20), -1))
records = [item.record for item in read_items(sys.argv[1], detect(sys.argv[1]))]
assert [type(record) is dict for record in records] == [True, False, False], records
print(records[1].reason, "and", records[2].reason)
try:
    list(read_items(sys.argv[2], detect(sys.argv[2])))
except MemoryError as error:
    print("no memory")
"""


def test_what_memory_does_not_suffice_for_is_told_as_that(tmp_path: Path) -> None:
    """Not as broken JSON, nor as a file that is cut short."""
    lines = write_jsonl(tmp_path / "in.jsonl", [chat("q", "a"), chat("q", "a" * (20 << 20)), b"{oops"])
    tables = [str(tmp_path / name) for name in ("in.arrow", "small.arrow")]
    for path, size in zip(tables, (96 << 20, 100), strict=True):
        table = pa.table({"text": ["x" * size]})
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(path, table.schema, options=options) as writer:
            writer.write_table(table)
    done = subprocess.run(
        [sys.executable, "-P", "-c", SHORT_OF_MEMORY, str(lines), *tables],
        env=clean_environment(), capture_output=True, text=True, timeout=280, check=False
    )  # fmt: skip
    assert done.stdout == "takes too much memory and broken JSON\nno memory\n", done.stderr


@pytest.mark.parametrize("container", ["arrow", "arrow stream"])
def test_an_arrow_file_whose_values_lie_outside_it_is_refused(tmp_path: Path, container: str) -> None:
    """Such a file has the right length: pyarrow would read what is not there, or raise SystemError."""
    table = pa.table({"prompt": ["abc", "def", "g"], "response": ["a", "b", "c"]})
    path = tmp_path / "in.arrow"
    new = pa.ipc.new_file if container == "arrow" else pa.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table)
    whole, offsets = path.read_bytes(), np.array([0, 3, 6, 7], dtype=np.int32).tobytes()
    assert whole.count(offsets) == 1
    for wrong in ([0, 3, 2**31 - 1, 7], [0, -3, 6, 7], [0, 6, 3, 7]):
        path.write_bytes(whole.replace(offsets, np.array(wrong, dtype=np.int32).tobytes()))
        with pytest.raises(UserError, match="cannot be read"):
            list(read_items(str(path), detect(str(path))))


def test_a_zstd_file_that_breaks_off_gives_what_is_before_the_break(tmp_path: Path) -> None:
    lines = [orjson.dumps(chat("q", f"answer {random.Random(i).random()}")) + b"\n" for i in range(2000)]
    whole = pa.Codec("zstd").compress(b"".join(lines), asbytes=True)
    path = tmp_path / "data.jsonl.zst"
    path.write_bytes(whole[: len(whole) * 3 // 4])
    found = [item.record for item in read_items(str(path), detect(str(path)))]
    assert isinstance(found[-1], Fault)
    assert found[-1].reason == "truncated file"
    assert len(found) > 0.3 * len(lines)
    assert found[:-1] == [orjson.loads(line) for line in lines[: len(found) - 1]]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pair = [pa.array(["a"]), pa.array(["b"])]
    columns = pa.table([pa.array(["q"]), *pair], names=["prompt", "completion", "completion"])
    turns = pa.StructArray.from_arrays([pa.array(["assistant"]), *pair], names=["role", "content", "content"])
    objects = pa.table([pa.ListArray.from_arrays([0, 1], turns)], names=["messages"])
    for name, table in (("columns", columns), ("objects", objects)):
        with pa.OSFile(str(tmp_path / name), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(UserError, match="called `co"):
            detect(str(tmp_path / name))
