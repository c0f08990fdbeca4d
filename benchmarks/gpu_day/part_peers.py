"""Beside transformers' Trainer on the same card: shapes of part_steps, every token supervised."""

from __future__ import annotations

import sys
from typing import Any

from day import ROOT, TINY, Day


def main(day: Day) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import hf_trainer

    if day.rehearse:
        day.skip("Liger", "its kernels need a GPU")
        small = [word for pair in TINY for word in ("--set", pair)]
        words = ["--preset", "nano", "--batch", "2", "--seq", "64", "--steps", "3", "--vocabulary", "512", *small]
        day.attempt("nano", lambda: day.record("nano, Trainer", **hf_trainer.main(words)))
        return
    day.attempt("Lumina, every token supervised", lambda: ours(day))
    # Liger replaces classes of the library for good: what goes without it comes first.
    for liger in (False, True):
        for preset in ("1b", "medium"):
            case = f"{preset}, Trainer{' with Liger' if liger else ''}"
            day.attempt(case, lambda c=case, p=preset, more=liger: trainer(day, hf_trainer, c, p, more))


def trainer(day: Day, hf_trainer: Any, case: str, preset: str, liger: bool) -> None:
    """The largest micro-batch of four, two or one that fits."""
    import torch

    for batch in (4, 2, 1):
        words = ["--preset", preset, "--batch", str(batch), "--seq", "4096", "--steps", "8", *(["--liger"] * liger)]
        try:
            day.record(case, micro_batch=batch, **hf_trainer.main(words))
            return
        except torch.OutOfMemoryError:
            day.record(f"{case}, micro-batch {batch}", out_of_memory=True)


def ours(day: Day) -> None:
    """The same through Lumina's engine, in the same process."""
    from lumina.kernels import model_step
    from part_steps import figures, fitting

    options = model_step.Options("1b", batch=4, steps=8, precision="bf16", drawn_on="cuda")
    trainer, found = fitting(day, options)
    day.record("1b, Lumina", **figures(found))
    trainer.close()
