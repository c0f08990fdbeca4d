"""The compiled kernels' resources on three architectures: a regression fails here, without a GPU.

Compiling needs a process in which kernels are not interpreted, so the tables come from the benchmark's own command.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long  # a minute of compilation

CARDS = ("A100", "H100", "B200")
#: Resident warps over the most a multiprocessor holds: enough to keep 16 kB of 128-bit loads in flight (32 lanes x 16
#: bytes x 2 tiles x 16 warps), what 3.35 TB/s over 132 multiprocessors at 0.6 microseconds of latency needs.
LEAST_OCCUPANCY = {"_backward": 0.25, "_forward": 0.5, "_rope": 0.5, "_cross_entropy": 0.5, "_sum_partials": 0.5}


def compile_table(path: Path, *options: str) -> list[dict[str, str]]:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LUMINA_KERNELS")}
    run = subprocess.run(
        [sys.executable, "-m", "lumina.kernels.bench", "--static", "--csv", str(path), *options],
        capture_output=True,
        text=True,
        env=clean,
    )
    assert run.returncode == 0, run.stderr
    with path.open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    cards = [word for card in CARDS for word in ("--card", card)]
    return compile_table(tmp_path_factory.mktemp("static") / "table.csv", *cards)


@pytest.fixture(params=CARDS)
def table(request: pytest.FixtureRequest, tables: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in tables if row["card"] == request.param]


def test_every_operator_and_preset_is_in_the_table(table: list[dict[str, str]]) -> None:
    from lumina.kernels.cases import LIMITS, PRESETS

    found = {(row["shape"], row["op"], row["direction"]) for row in table}
    assert found == {(shape.name, op, direction) for shape in PRESETS for op, direction in LIMITS}


def test_no_spills(table: list[dict[str, str]]) -> None:
    assert [row for row in table if row["spills"] != "0"] == []


def test_hot_loads_and_stores_are_128_bits_wide(table: list[dict[str, str]]) -> None:
    from lumina.kernels.static import NARROW_ALLOWED

    for row in table:
        assert int(row["narrow"]) <= NARROW_ALLOWED[row["kernel"]], row
        # Every streamed tensor is accessed by wide instructions: as many as it has parts in the formula, at least.
        assert int(row["wide"]) >= (4 if row["kernel"] == "_sum_partials" else 6), row


def test_registers_and_shared_memory_stay_in_budget(table: list[dict[str, str]]) -> None:
    for row in table:
        assert int(row["registers"]) <= (128 if row["kernel"] == "_backward" else 64), row
        assert int(row["shared"]) <= 16 * 1024, row


def test_occupancy(table: list[dict[str, str]]) -> None:
    for row in table:
        assert float(row["occupancy"]) >= LEAST_OCCUPANCY[row["kernel"]], row


def test_bytes_are_within_five_percent(table: list[dict[str, str]]) -> None:
    counted = [row for row in table if row["bytes_per_element"]]
    assert counted
    for row in counted:
        assert float(row["bytes_per_element"]) <= 1.05 * float(row["limit_per_element"]), row


def test_wide_rows_and_wide_types_do_not_spill(tmp_path: Path) -> None:
    """fp32 holds half as many columns a program as bf16, without prefetching past 4,096, and past that rows are swept.

    5,504 is padded to the tile of 8,192 and has rows whose number is no multiple of 16: other code of the same tile.
    """
    widths = (5504, 8192, 32768, 65536)
    only = [word for width in widths for word in ("--only", f"width {width}")]
    operators = ("--op", "rms_norm", "--op", "add_rms_norm")
    options = ("--card", "H100", "--shapes", "sweep", *operators, "--dtype", "fp32", *only)
    rows = compile_table(tmp_path / "table.csv", *options)
    assert {int(row["width"]) for row in rows} == set(widths)
    assert {row["op"] for row in rows} == {"rms_norm", "add_rms_norm"}
    for row in rows:
        assert row["spills"] == "0", row
        assert int(row["registers"]) <= 128, row
        assert int(row["wide"]) > 0, row


def test_fp16_does_not_spill(tmp_path: Path) -> None:
    from lumina.kernels.cases import LIMITS

    options = ("--card", "H100", "--dtype", "fp16", "--only", "large")
    rows = compile_table(tmp_path / "table.csv", *options)
    assert {(row["op"], row["direction"]) for row in rows} == set(LIMITS)
    assert {row["dtype"] for row in rows} == {"float16"}
    for row in rows:
        assert row["spills"] == "0", row
