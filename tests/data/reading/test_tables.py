"""Tables with broken quotes: a break costs its rows, each counted, and no half of a field becomes a record."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.data.reading.items import read_items
from lumina.data.reading.layout import detect
from lumina.data.reading.tables import BROKEN_TABLE, read_table
from lumina.data.records.fault import Fault

HEADER = ["prompt", "response"]


def written(rows: Sequence[Sequence[str]], quoting: int = csv.QUOTE_MINIMAL) -> list[str]:
    """Each row as a well-behaved program writes it."""
    texts = []
    for row in rows:
        out = io.StringIO()
        csv.writer(out, quoting=quoting, lineterminator="\n").writerow(row)
        texts.append(out.getvalue())
    return texts


def read(text: str) -> list[dict[str, str] | Fault]:
    return [record for _, _, record in read_table(iter([text.encode()]), ",")]


BROKEN = [  # and how many rows after it are lost because they close its quote
    ('q2,"she said "no" and left"\n', 0),  # not escaped
    ('q2,"she said "no\nand, then" left"\n', 0),  # over two lines, the second of them two fields
    ('q2,"a"b\nHello, world\n', 0),
    ('q2,"never closed\n', 1),
    ('"q2,never closed either\n', 1),
]
ROWS = [["q1", "a1"], ["q3", "one, two"], ["q4", 'say "hi",\nthen go'], ["q5", "a5"], ["q6", "a6"]]


@pytest.mark.parametrize(("broken", "closing"), BROKEN)
@pytest.mark.parametrize(("quoting", "unsure"), [(csv.QUOTE_ALL, 0), (csv.QUOTE_MINIMAL, 1)])
def test_a_broken_row_costs_itself_and_the_rows_after_it_are_read(
    tmp_path: Path, broken: str, closing: int, quoting: int, unsure: int
) -> None:
    """Where first fields stand without quotes, one row more: it could be the end of the broken one."""
    texts = written(ROWS, quoting)
    path = tmp_path / "data.csv"
    path.write_text("prompt,response\n" + texts[0] + broken + "".join(texts[1:]))
    items = list(read_items(str(path), detect(str(path))))
    read_on = 1 + closing + unsure
    assert [item.record for item in items if not isinstance(item.record, Fault)] == [
        dict(zip(HEADER, row, strict=True)) for row in (ROWS[0], *ROWS[read_on:])
    ]
    lost = (broken + "".join(texts[1:read_on])).count("\n")
    assert [item.record.reason for item in items if isinstance(item.record, Fault)] == [BROKEN_TABLE] * lost
    assert [item.number for item in items] == list(range(1, len(items) + 1))


TEXTS = st.text(alphabet='ab ,"\n', max_size=12).filter(lambda text: text.strip())


@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=2, max_size=8),
    at=st.integers(0, 7),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    data=st.data(),
)
def test_whatever_breaks_no_half_of_a_field_is_a_record(
    rows: list[tuple[str, str]], at: int, quoting: int, data: st.DataObject
) -> None:
    """One quote too many or too few anywhere in one row: all other rows, or nothing, but never something else."""
    texts = written(rows, quoting)
    at %= len(rows)
    text = texts[at]
    places = [i for i, character in enumerate(text) if character == '"']
    place = data.draw(st.sampled_from(places)) if places else 0
    harmed = text[:place] + text[place + 1 :] if places else '"' + text
    found = read("prompt,response\n" + "".join([*texts[:at], harmed, *texts[at + 1 :]]))
    broken = next((i for i, record in enumerate(found) if getattr(record, "reason", "") == BROKEN_TABLE), len(found))
    before, after = (
        [(record["prompt"] or "", record["response"] or "") for record in part if isinstance(record, dict)]
        for part in (found[:broken], found[broken:])
    )
    assert before[:at] == rows[:at]
    # Two sound fields are no break: up to the first one, a file says what a strict reader of CSV reads in it.
    assert set(before[at:]) <= said_until_it_breaks(harmed + "".join(texts[at + 1 :]))
    assert set(after) <= set(rows)


def said_until_it_breaks(text: str) -> set[tuple[str, ...]]:
    said, reader = set(), csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        said.update(map(tuple, reader))
    except csv.Error:
        return said
    return said
