"""Door: data files. Each line: what is done to a sound file, and what the reader makes of it."""

from __future__ import annotations

import gzip
import json
import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lumina.config import UserError
from lumina.data import check_inputs, detect, read_items
from lumina.data.reading.streams import LONG_LINE, LONGEST_LINE, read_lines
from lumina.data.records.fault import Fault

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]
LINE = json.dumps({"messages": TURNS}).encode() + b"\n"


def records(path: Path) -> list[Any]:
    return [item.record for item in read_items(str(path), detect(str(path)))]


def parquet(path: Path) -> None:
    pq.write_table(pa.table({"messages": [TURNS] * 500}), path)


def arrow(path: Path) -> None:
    table = pa.table({"messages": [TURNS] * 500})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
        out.write_table(table)


def arrow_stream(path: Path) -> None:
    table = pa.table({"messages": [TURNS] * 500})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)


@pytest.mark.parametrize("write", [parquet, arrow, arrow_stream])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_table_that_is_cut_short_is_said(tmp_path: Path, write: Callable[[Path], None], share: float) -> None:
    path = tmp_path / "data"
    write(path)
    assert len(records(path)) == 500
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(UserError, match=r"cannot be read: (.|\n)*It is cut short or damaged"):
        records(path)


def test_a_line_without_end_is_not_held(tmp_path: Path) -> None:
    """120 MB of one line in 120 kB; the lines around it are read."""
    plain, packed, zstd = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz", tmp_path / "a.jsonl.zst"
    with plain.open("wb") as out:
        out.write(LINE)
        out.truncate(len(LINE) + 120 * 10**6)
        out.seek(0, os.SEEK_END)
        out.write(b"\n" + LINE)
    with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=1) as target:
        while block := source.read(1 << 20):
            target.write(block)
    with plain.open("rb") as source, pa.output_stream(str(zstd), compression="zstd") as target:
        while block := source.read(1 << 20):
            target.write(block)
    for path in (plain, packed, zstd):
        held = pa.total_allocated_bytes()
        tracemalloc.start()
        first, long, last = records(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert first == last == {"messages": TURNS}
        assert isinstance(long, Fault)
        assert long.reason == LONG_LINE
        assert peak < 1.5 * LONGEST_LINE, f"{path.name}: {peak / 1e6:.0f} MB"
        assert pa.total_allocated_bytes() - held < 1 << 22, path.name
    size = plain.stat().st_size
    for middle in (len(LINE), 10**8):  # read in two ranges, as two workers do
        both = [*read_lines(str(plain), 0, middle), *read_lines(str(plain), middle, size)]
        assert [type(line) for line in both] == [bytes, Fault, bytes], middle


@pytest.mark.parametrize("dictionary", [False, True])
def test_a_row_group_is_not_held(tmp_path: Path, dictionary: bool) -> None:
    """One row group of 200 MB, in rows of 4 MB, in a small file. (A page is held whole: its writer chose its size.)
    With a dictionary all rows are one value of it, and the file says 4 MB of the row group."""
    path = tmp_path / "a.parquet"
    schema = pa.schema({"prompt": pa.string(), "response": pa.string()})
    prompts = [str(0 if dictionary else at) + "x" * (4 << 20) for at in range(48)]
    table = pa.table({"prompt": prompts, "response": ["y"] * 48}, schema)
    how = {"use_dictionary": True} if dictionary else {"use_dictionary": False, "write_batch_size": 1}
    pq.write_table(table, path, row_group_size=48, compression="zstd", **how)
    del table
    held, most, rows = pa.total_allocated_bytes(), 0, 0
    for item in read_items(str(path), detect(str(path))):
        most, rows = max(most, pa.total_allocated_bytes() - held), rows + 1
        assert item.record["prompt"].startswith("0" if dictionary else str(item.number - 1))
    assert rows == 48
    assert path.stat().st_size < 1 << 20
    assert most < 2 * LONGEST_LINE, f"{most / 1e6:.0f} MB"


DEEP = b"[" * 100_000
CONTENTS: list[tuple[str, bytes, int]] = [  # name, contents, how many records are usable
    ("deep.jsonl", LINE + b'{"messages": ' + DEEP + b"\n" + LINE, 2),
    ("deep.json", b"[" + LINE + b"," + b'{"a":' * 100_000 + b"\n" + LINE + b"]", 1),
    ("digits.jsonl", LINE + b'{"a": ' + b"9" * 5000 + b"}\n" + LINE, 2),
    ("digits.json", b"[" + LINE + b', {"a": ' + b"9" * 5000 + b"},\n" + LINE + b"]", 2),
    ("wrapped.json", b'{"data": [\n' + LINE + b'], "more": ' + b"9" * 5000 + b"}", 1),
    ("latin.jsonl", '{"messages": "é"}\n'.encode("latin-1") + LINE, 1),
    ("nul.jsonl", b"\0" * 5000 + b"\n" + LINE, 1),
    ("cut.jsonl.gz", gzip.compress(LINE * 5000)[:-40], 4000),
    ("quote.csv", b'prompt,response\na,b\n"' + b"c,d\n" * 1000, 1),
]


@pytest.mark.parametrize(("name", "contents", "least"), CONTENTS, ids=lambda value: value if type(value) is str else "")
def test_what_is_whole_is_read_and_the_rest_is_a_fault(tmp_path: Path, name: str, contents: bytes, least: int) -> None:
    path = tmp_path / name
    path.write_bytes(contents)
    found = records(path)
    sound = [record for record in found if not isinstance(record, Fault)]
    good = [record for record in sound if "messages" in record or "prompt" in record]
    assert len(good) >= least
    assert any(isinstance(record, Fault) or "a" in record for record in found), "the rest is accounted for"


@pytest.mark.timeout(240)
def test_a_stream_is_read(tmp_path: Path) -> None:
    """`lumina validate-data <(zcat *.gz)`: read once, and then as often as data is."""
    pipe = tmp_path / "fifo"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(LINE * 300), daemon=True)
    writer.start()
    (file,) = check_inputs([pipe])
    writer.join()
    assert len(records(file)) == 300
    assert check_inputs([pipe]) == [file], "the second time too"


def test_a_stream_is_not_read_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes cannot read"):
        check_inputs([tmp_path / "fifo"])


PATHS = ["/dev/zero", "/dev/null", "/proc/self/mem/x", "a\0b", "x" * 300, "."]


@pytest.mark.timeout(100)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:10])
def test_what_is_no_data_file_is_said(path: str) -> None:
    with pytest.raises(UserError, match="data file"):
        check_inputs([path])
