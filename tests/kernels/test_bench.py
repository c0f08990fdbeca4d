import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lumina.kernels import bench, benchmark, cases, model_step, output_layer, peers, reference
from lumina.kernels.benchmark import BENCHMARKS

SMALL = benchmark.Shape("tiny", 64, 96, 4, 2, 16, 200, tokens=20, sequence=10)


def test_without_a_gpu_it_prints_the_static_table_and_says_so(tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LUMINA_KERNELS")}
    table, plot = tmp_path / "out" / "table.csv", tmp_path / "out" / "plot.png"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "lumina.kernels.bench", "--op", "swiglu", "--op", "rms_norm", "--card", "A100"),
            *("--only", "debug", "--bandwidth", "1000", "--csv", str(table), "--plot", str(plot)),
        ],
        capture_output=True,
        text=True,
        env=clean | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr
    assert "no GPU was used" in run.stdout
    assert "no measurement" in run.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = table.read_text().splitlines()
    assert lines[0].startswith("# static: Static table: no GPU was used")
    header, *rows = [line.split(",") for line in lines if not line.startswith("#")]
    forward = dict(zip(header, next(row for row in rows if row[3] == "swiglu"), strict=True))
    # 8,192 tokens x 1,408 x 6 bytes at 1,000 GB/s
    assert float(forward["predicted_us"]) == pytest.approx(8192 * 1408 * 6 / 1e12 * 1e6, abs=0.01)


def test_a_shape_of_the_other_set_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--only", "width 512"]) == 2
    assert "width 512" in capsys.readouterr().err


def test_interpreted_kernels_cannot_be_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--static", "--op", "rope"]) == 2
    assert "unset LUMINA_KERNELS" in capsys.readouterr().err


@pytest.mark.parametrize(("op", "direction"), cases.LIMITS)
def test_measuring_runs_every_side(op: str, direction: str) -> None:
    """The GPU's benchmark, on interpreted kernels and the wall clock: what it computes, not how fast."""
    case = benchmark.Case(op, direction, SMALL, torch.float32)
    measured = peers.measure(case, "cpu", repeats=1)
    rows = [found.fields() for found in measured]
    assert [row["side"] for row in rows] == ["lumina", "eager", "copy"]
    assert rows[2]["of_copy"] == 1
    moved = case.bytes(case.launches())
    for row, found in zip(rows, measured, strict=True):
        assert row["timed"] == "wall"
        # From the time as it was measured: the microseconds shown are rounded, by half a percent of a short copy's.
        assert row["us"] == pytest.approx(found.timed.seconds * 1e6, abs=0.006)
        assert row["GB/s"] == pytest.approx(moved / found.timed.seconds / 1e9, abs=0.06)


def test_a_side_that_fails_is_named_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def sides(case: benchmark.Case, device: str) -> dict[str, object]:
        def broken(*_: object) -> None:
            raise ZeroDivisionError

        return {"lumina": lambda: BENCHMARKS[case.op].ours, "liger": lambda: broken}

    monkeypatch.setattr(peers, "sides_of", sides)
    case = benchmark.Case("swiglu", "forward", SMALL, torch.float32)
    ours, liger, _ = (found.fields() for found in peers.measure(case, "cpu", repeats=1))
    assert ours["us"] > 0
    assert (liger["us"], liger["of_copy"], liger["timed"]) == (None, None, "failed: ZeroDivisionError")


def test_twelve_shapes_are_all_compiled_and_a_fallback_is_seen() -> None:
    """torch compiles eight shapes of a function and runs the ninth eagerly: each is compiled anew here, and a function
    that was not compiled, or in parts, is told apart."""
    for width in range(2, 14):
        compiled = peers.compiled(reference.swiglu, backend="eager")
        compiled(torch.randn(3, 2 * width))
        assert peers.really_compiled(), width
    once = torch.compile(reference.swiglu, dynamic=False, backend="eager")
    for width in range(2, 14):
        peers.torch._dynamo.utils.counters.clear()
        once(torch.randn(5, 2 * width))
    assert not peers.really_compiled()  # the thirteenth shape went past the limit


def test_a_side_that_was_not_compiled_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "sides_of", lambda case, device: {"compile": lambda: BENCHMARKS[case.op].eager})
    peers.compiled(reference.swiglu)  # forgets, and is not what runs
    row = peers.measure(benchmark.Case("swiglu", "forward", SMALL, torch.float32), "cpu", repeats=1)[0].fields()
    assert (row["us"], row["timed"]) == (None, "not compiled")


def test_the_output_layer_is_measured_and_right(tmp_path: Path) -> None:
    wanted = ("lumina", "eager")
    assert output_layer.run([SMALL], torch.float32, 1, tmp_path / "out.csv", rows=16) == 0
    header, *rows = [line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines() if line[0] != "#"]
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["side"] for row in table] == list(wanted)
    assert all(float(row["ms"]) > 0 and row["timed"] == "wall" for row in table)
    found = []
    for side in wanted:
        torch.manual_seed(0)
        found.append(output_layer.step_of(output_layer.sides()[side], SMALL, 16, torch.float32, "cpu")())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("op", cases.OPERATORS)
def test_sides_compute_the_same(op: str) -> None:
    case = benchmark.Case(op, "forward", SMALL, torch.float32)
    torch.manual_seed(0)
    given = BENCHMARKS[op].arguments(case, "cpu")
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in given]
    with torch.no_grad():
        ours, eager = BENCHMARKS[op].ours(*given), BENCHMARKS[op].eager(*copies)
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(given[0], copies[0])


def test_backward_steps_give_gradients() -> None:
    case = benchmark.Case("add_rms_norm", "backward", SMALL, torch.float32)
    gradients = peers.step_of(BENCHMARKS["add_rms_norm"].ours, case, "cpu")()
    assert [g.shape for g in gradients] == [(20, 64), (20, 64), (64,)]
    assert all(g.isfinite().all() for g in gradients)


def test_measured_tables_are_written_and_drawn(tmp_path: Path) -> None:
    case = benchmark.Case("swiglu", "forward", SMALL, torch.float32)
    table = bench.measured_table([case], "cpu", 1)
    bench.write_csv(tmp_path / "m.csv", table, {"gpu": "none"})
    bench.write_plot(tmp_path / "m.png", table, static=False)
    assert (tmp_path / "m.csv").read_text().startswith("# gpu: none\nshape,op,")
    assert (tmp_path / "m.png").stat().st_size > 1000


def test_environment_is_recorded() -> None:
    assert {"python", "torch", "triton", "machine"} <= set(peers.environment())


TINY = ("hidden_size=64", "num_layers=1", "num_heads=2", "num_kv_heads=1", "seq_length=16")


def test_training_steps_through_the_engine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = model_step.Options("nano", TINY, batch=2, accumulation=2, stage=2, steps=2, vocabulary=128)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # DeepSpeed's buffers
    trainer = model_step.Trainer(options)
    found = model_step.time_step(options, trainer)
    assert (found.tokens, found.stage, found.world) == (2 * 2 * 16, 2, 1)
    assert found.tokens_per_second == pytest.approx(found.tokens / found.seconds)
    assert found.card.startswith("CPU")
    assert found.mfu is None  # a CPU's peak is not known (law 8)
    # Five steps on random tokens: near log(128) = 4.85.
    assert 4.0 < found.loss < 6.0
    assert "tokens/s" in model_step.line(asdict(found))

    # On a card whose peak is known the same counts make its MFU: 3 x forward, over seconds and peak.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        "lumina.plan.costs.devices.local_device", lambda: SimpleNamespace(peak={trainer.precision: 1e12})
    )
    layer = 64 * 32 * (2 * 2 + 2 * 1) + 3 * 64 * 192
    forward = 2 * layer + 4 * 2 * 32 * (16 + 1) / 2 + 2 * 64 * 128
    assert trainer.mfu(1e-3) == pytest.approx(3 * forward * 64 / 1e-3 / 1e12)
    monkeypatch.undo()
    trainer.close()


def test_every_path_of_a_training_step_is_a_process_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def run(command: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        started.append((command[2:], env["LUMINA_KERNELS"]))
        figures = model_step.StepTime("nano", "auto", "X", "bf16", 0, False, 1, 1, 8, 0.5, 16.0, 0.25, 2**30, 1.0)
        return SimpleNamespace(returncode=len(started) - 1, stdout=json.dumps(asdict(figures)), stderr="broken")

    monkeypatch.setattr(subprocess, "run", run)
    assert model_step.compare("nano", 3, ["--stage", "1"]) == 1
    words = ["lumina.kernels.model_step", "nano", "--steps", "3", "--stage", "1"]
    assert started == [(words, "auto"), (words, "torch")]
    printed = capsys.readouterr()
    assert "25.0%" in printed.out
    assert "the step by torch failed:\nbroken" in printed.err
