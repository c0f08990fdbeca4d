"""The kernels and the output layer by graph replay beside their peers (lumina.kernels.bench), at two shapes."""

from __future__ import annotations

import os
from typing import Any

from day import Day


def main(day: Day) -> None:
    if day.rehearse:
        os.environ["LUMINA_KERNELS"] = "interpret"
    import torch
    from lumina.kernels import benchmark, cases, output_layer, peers

    device = "cpu" if day.rehearse else "cuda"
    if day.rehearse:
        shapes = (benchmark.Shape("tiny", 64, 96, 4, 2, 16, 200, tokens=20, sequence=10),)
        operators, dtype, repeats, rows = ("rms_norm", "swiglu", "cross_entropy"), torch.float32, 2, 16
    else:
        shapes = tuple(shape for shape in cases.PRESETS if shape.name in ("medium", "large"))
        operators, dtype, repeats, rows = cases.OPERATORS, torch.bfloat16, 30, output_layer.ROWS
    for shape in shapes:
        day.attempt(f"{shape.name}, output layer", lambda s=shape: layer(day, output_layer, s, rows, dtype, device))
        for case in cases.cases((shape,), operators, dtype):
            name = f"{shape.name}, {case.op} {case.direction}"
            day.attempt(name, lambda c=case, n=name: operator(day, peers.measure(c, device, repeats), n))


def operator(day: Day, found: list[Any], name: str) -> None:
    wanted = ("us", "spread", "GB/s", "of_copy", "timed")
    for measured in found:
        row = measured.fields()
        day.record(f"{name}: {measured.side}", **{key: row[key] for key in wanted})


def layer(day: Day, output_layer: Any, shape: Any, rows: int, dtype: Any, device: str) -> None:
    for row in output_layer.measure(shape, rows, dtype, device, 5 if device == "cuda" else 1):
        figures = {key: row[key] for key in ("rows", "ms", "TFLOP/s", "peak_mib", "timed")}
        day.record(f"{shape.name}, output layer: {row['side']}", **figures)
