"""metrics.jsonl: every step once, whatever was killed in between."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.config import UserError
from lumina.monitor import HealthStatus, MetricsFile, StepRecord, read_metrics
from lumina.monitor.reports.loss_curve import plot_loss


def record(step: int, loss: float = 2.5, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "epoch": 1,
        "batch": step,
        "batches": 10,
        "lr": 1e-4,
        "grad_norm": 0.5,
        "tokens": 64,
        "supervised_tokens": 30,
        "tokens_per_s": 100.0,
        "memory": 1,
        "memory_total": 2,
        "memory_kind": "Mem",
        "health": HealthStatus(),
        "time": 1.7e9,
    }
    return StepRecord(step=step, loss=loss, **(values | changes))


def write(path: Path, steps: range, resumed: int = 0) -> None:
    file = MetricsFile(path, resumed)
    for step in steps:
        file.step(record(step))
        if step % 2 == 0:
            file.evaluation(step, 2.0, math.exp(2.0), 0.12345)
    file.close()


def places(path: Path) -> list[tuple[str, int]]:
    return [(r["kind"], r["step"]) for r in read_metrics(path)]


def test_a_step_and_an_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(2, 3))
    step, evaluation = (json.loads(text) for text in path.read_text().splitlines())
    wanted = "step epoch loss ppl lr grad_norm tokens supervised_tokens tokens_per_s mfu memory health time"
    assert set(wanted.split()) <= set(step)
    assert (step["kind"], step["step"], step["loss"], step["mfu"]) == ("step", 2, 2.5, None)
    assert step["ppl"] == math.exp(2.5)
    assert evaluation == {"kind": "eval", "step": 2, "loss": 2.0, "ppl": math.exp(2.0), "seconds": 0.123}


def test_lines_are_there_at_once(tmp_path: Path) -> None:
    """A killed run has closed nothing."""
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2):
        file.step(record(step))
        assert places(tmp_path / "metrics.jsonl")[-1] == ("step", step)
    file.close()


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.step(record(1, math.nan, grad_norm=math.inf))
    file.evaluation(1, math.inf, math.inf, 1.0)
    file.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    step, evaluation = (json.loads(text, parse_constant=refuse) for text in path.read_text().splitlines())
    assert (step["loss"], step["ppl"], step["grad_norm"]) == (None, None, None)
    assert (evaluation["loss"], evaluation["ppl"]) == (None, None)


def test_resuming_drops_later_steps(tmp_path: Path) -> None:
    """A run saved at step 4 and killed at step 7 goes on from 5: no step is there twice."""
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    write(path, range(5, 10), resumed=4)
    assert [step for kind, step in places(path) if kind == "step"] == list(range(1, 10))
    assert [step for kind, step in places(path) if kind == "eval"] == [2, 4, 6, 8]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    write(path, range(1, 3))
    assert [step for kind, step in places(path) if kind == "step"] == [1, 2]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(cut=st.integers(0, 400))
def test_a_torn_last_line(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    """Cut anywhere in its last line, the file reads as the lines before it, and a resumed run writes on cleanly."""
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    write(path, range(1, 4))
    file = MetricsFile(path, 3)
    file.step(record(4))
    file.close()
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    path.write_bytes(whole[: last + min(cut, len(whole) - last - 2)])
    before = [("step", 1), ("step", 2), ("eval", 2), ("step", 3)]
    assert places(path) == before
    write(path, range(4, 6), resumed=3)
    assert places(path) == [*before, ("step", 4), ("eval", 4), ("step", 5)]


def test_a_missing_file_has_no_records(tmp_path: Path) -> None:
    assert list(read_metrics(tmp_path / "nothing.jsonl")) == []


@pytest.mark.parametrize(
    "line",
    ["3", "[]", "{}", '{"kind": "step"}', '{"kind": 1, "step": 1}', '{"kind": "step", "step": 9}'],
)
def test_a_line_that_is_no_record_is_left_out(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 2))
    before = places(path)
    with path.open("a") as file:
        file.write(line + "\n")
    assert places(path) == before
    plot_loss(tmp_path, tmp_path / "curve.png", baseline=3.0)


def test_no_scratch_file_stays(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", range(1, 3))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


# --- The curve ---


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    """With a step whose loss is not finite and the baseline, as a run may leave them."""
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    file = MetricsFile(path, 5)
    file.step(record(6, math.nan))
    file.close()
    plot_loss(tmp_path, tmp_path / "curve.png", baseline=3.0)
    picture = (tmp_path / "curve.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 5000


def test_a_run_without_steps_has_no_curve(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no steps"):
        plot_loss(tmp_path, tmp_path / "curve.png")


def test_experts_are_figures_of_their_own(tmp_path: Path) -> None:
    """As curves of the report, and null in the records of a dense model."""
    from lumina.monitor.reports.run_data import Group

    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.step(record(1, 2.5, experts={"load": 1.5, "idle": 0.0, "entropy": 1.2, "loss": math.nan}))
    metrics.step(record(2, 2.5))
    metrics.close()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["experts"] == {"load": 1.5, "idle": 0.0, "entropy": 1.2, "loss": None}
    assert second["experts"] is None
    group = Group()
    group.add(1, first)
    assert group.columns["experts/load"] == [1.5]
