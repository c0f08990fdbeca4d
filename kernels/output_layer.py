"""The output layer and its loss, forward and backward, beside torch eager and Liger (`bench --output-layer`).

N supervised rows of width D against a vocabulary of V: three matrix products (logits, hidden gradient, weight
gradient), 6 N D V FLOPs, and the loss between them. Ours is `lumina.model.loss.output_loss`; with `model_step.py` this
is a file here that knows the model, and nothing imports it but the benchmark.
"""

from __future__ import annotations

import csv
import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .benchmark import Function, Shape
from .peers import environment
from .timing import Step, device_seconds

#: Rows of one call: the supervised half of a micro-batch of 8,192 tokens.
ROWS = 4096
COLUMNS = ("shape", "rows", "hidden", "vocabulary", "side", "ms", "TFLOP/s", "peak_mib", "timed")


def sides() -> dict[str, Function]:
    """loss(hidden, weight, targets) -> a scalar sum, by each side that is installed."""
    ours = importlib.import_module("lumina.model.loss").output_loss

    def lumina(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Any:
        return ours(hidden, weight, targets, torch.ones(len(targets), device=targets.device))

    def eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Any:
        return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")

    found: dict[str, Function] = {"lumina": lumina, "eager": eager}
    try:
        peer = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    except ImportError:
        return found

    def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Any:
        call = peer.LigerFusedLinearCrossEntropyFunction.apply
        return call(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")[0]

    return found | {"liger": liger} if torch.cuda.is_available() else found


def step_of(function: Function, shape: Shape, rows: int, dtype: torch.dtype, device: str) -> Step:
    """Loss and both gradients on fresh inputs."""
    hidden = torch.randn(rows, shape.hidden, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(shape.vocabulary, shape.hidden, device=device) * 0.02).to(dtype).requires_grad_()
    targets = torch.randint(0, shape.vocabulary, (rows,), device=device)
    return lambda: torch.autograd.grad(function(hidden, weight, targets), (hidden, weight))


def peak_bytes(step: Step, device: str) -> int | None:
    """Bytes that one step allocates at most, above its inputs; None on a CPU, whose allocator keeps no count."""
    if not device.startswith("cuda"):
        return None
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def measure(shape: Shape, rows: int, dtype: torch.dtype, device: str, repeats: int) -> list[dict[str, Any]]:
    """One row per side, ours first; a side that fails has no figures and says why."""
    size = (rows + shape.vocabulary) * shape.hidden * dtype.itemsize
    table = []
    for side, function in sides().items():
        row = {"shape": shape.name, "rows": rows, "hidden": shape.hidden, "vocabulary": shape.vocabulary, "side": side}
        make = functools.partial(step_of, function, shape, rows, dtype, device)
        try:
            peak = peak_bytes(make(), device)
            timed = device_seconds(make, size, device, repeats)
        except Exception as error:  # another library's, or memory that ran out
            if side == "lumina":
                raise
            table.append(row | dict.fromkeys(COLUMNS[5:]) | {"timed": f"failed: {type(error).__name__}"})
            continue
        rate = 6 * rows * shape.hidden * shape.vocabulary / timed.seconds / 1e12
        figures = {"ms": round(timed.seconds * 1e3, 3), "TFLOP/s": round(rate, 2)}
        table.append(row | figures | {"peak_mib": peak and round(peak / 2**20), "timed": timed.how})
    return table


def run(shapes: Sequence[Shape], dtype: torch.dtype, repeats: int, path: Path | None, rows: int = ROWS) -> int:
    """Measure every shape, printing as it comes; returns the exit status."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    note = environment() | {"device": device, "dtype": str(dtype).removeprefix("torch.")}
    print("\n".join(f"{key}: {value}" for key, value in note.items()))
    print("  ".join(column.ljust(10) for column in COLUMNS), flush=True)
    table = []
    for shape in shapes:
        for row in measure(shape, rows, dtype, device, repeats):
            print("  ".join(str("" if row[c] is None else row[c]).ljust(10) for c in COLUMNS), flush=True)
            table.append(row)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            file.writelines(f"# {key}: {value}\n" for key, value in note.items())
            writer = csv.DictWriter(file, fieldnames=COLUMNS)
            writer.writeheader()
            writer.writerows(table)
    return 0
