"""Beside transformers' Trainer on the same card: shapes of part_steps, every token supervised."""

from __future__ import annotations

import sys

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
    # Liger replaces classes of the library for good: what goes without it comes first.
    runs = [(preset, batch, liger) for liger in (False, True) for preset, batch in (("1b", 4), ("medium", 4))]
    for preset, batch, liger in runs:
        case = f"{preset}, Trainer{' with Liger' if liger else ''}"
        words = ["--preset", preset, "--batch", str(batch), "--seq", "4096", "--steps", "8", *(["--liger"] * liger)]
        day.attempt(case, lambda c=case, w=words: day.record(c, **hf_trainer.main(w)))
    day.attempt("Lumina, every token supervised", lambda: ours(day))


def ours(day: Day) -> None:
    """The same through Lumina's engine, in the same process."""
    from lumina.kernels import model_step
    from part_steps import figures

    options = model_step.Options("1b", batch=4, steps=8, precision="bf16")
    day.record("1b, Lumina", **figures(model_step.time_step(options)))
