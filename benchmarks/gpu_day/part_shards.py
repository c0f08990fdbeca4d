"""ZeRO-2 and ZeRO-3 on one card: what their machinery costs when nothing is shared, and what memory they take."""

from __future__ import annotations

from day import TINY, Day


def main(day: Day) -> None:
    from lumina.kernels import model_step
    from part_steps import figures

    for stage in (0, 2, 3):
        if day.rehearse:
            options = model_step.Options("nano", TINY, stage=stage, steps=2, vocabulary=512, precision="fp32")
        else:
            options = model_step.Options(
                "medium", batch=4, stage=stage, steps=8, precision="bf16", supervised=0.5, drawn_on="cuda"
            )
        case = f"{options.preset}, ZeRO-{stage}"
        found = day.attempt(case, lambda o=options: model_step.time_step(o))
        if found is not None:
            day.record(case, **figures(found))
