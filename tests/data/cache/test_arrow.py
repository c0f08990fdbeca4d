"""Arrays between Arrow and NumPy: pyarrow's own conversion is the reference, and pandas stays out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.data.cache import arrow
from tests.data.helpers import chat, write_jsonl

KINDS = {pa.int32(): np.int32, pa.int64(): np.int64, pa.uint8(): np.uint8}


@given(st.sampled_from(list(KINDS)), st.lists(st.integers(0, 255)), st.integers(0, 5))
def test_integers_there_and_back(kind: pa.DataType, values: list[int], cut: int) -> None:
    given_ = np.array(values, KINDS[kind])
    made = arrow.integers(kind, given_)
    made.validate(full=True)
    assert made.equals(pa.array(values, kind))
    back = arrow.numpy(made.slice(cut))
    assert back.dtype == KINDS[kind]
    assert back.tolist() == values[cut:]


@given(st.lists(st.booleans()), st.integers(0, 9))
def test_booleans_of_earlier_caches(values: list[bool], cut: int) -> None:
    back = arrow.numpy(pa.array(values, pa.bool_()).slice(cut))
    assert back.dtype == np.bool_
    assert back.tolist() == values[cut:]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_strings(texts: list[str]) -> None:
    made = arrow.strings(texts)
    made.validate(full=True)
    assert made.to_pylist() == texts


def test_another_dtype_and_missing_values_are_refused() -> None:
    with pytest.raises(TypeError, match="int64 is not int32"):
        arrow.integers(pa.int32(), np.arange(3))
    with pytest.raises(ValueError, match="1 values are missing"):
        arrow.numpy(pa.array([1, None]))


def test_every_other_element_is_copied() -> None:
    assert arrow.integers(pa.int64(), np.arange(6)[::2]).to_pylist() == [0, 2, 4]


# Asking for pandas ends the process, whether there is one or not.
SCRIPT = """
import os, sys
from lumina import cli

class Trap:
    def find_spec(self, name, path=None, target=None):
        if name == "pandas":
            os._exit(9)

sys.meta_path.insert(0, Trap())
code = cli.main(sys.argv[1:])
assert "pyarrow" in sys.modules
raise SystemExit(code)
"""


def test_data_is_prepared_validated_and_opened_without_pandas(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [chat("Is it raining?", f"No, {n} drops.") for n in range(40)])
    prepare = ["prepare", "in.jsonl", "--config", "nano", "--cache-dir", "cache"]
    for line in (prepare, prepare, ["validate-data", "in.jsonl"]):
        done = subprocess.run([sys.executable, "-c", SCRIPT, *line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
