"""How fast does it train? Presets through the engine, eager and compiled, and where one step's time goes."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from day import TINY, Day

#: (preset, samples of a micro-batch): about 16,384 tokens; half as many when they do not fit.
RUNS = (("medium", 4), ("1b", 4), ("large", 2))


def main(day: Day) -> None:
    from lumina.kernels.model_step import Options

    if day.rehearse:
        day.skip("compile", "Inductor takes longer than the rehearsal")
        options = Options("nano", TINY, batch=2, steps=2, vocabulary=512, precision="fp32")
        day.attempt("nano", lambda: preset(day, options, compiled=False, profiled=True))
        return
    for name, batch in RUNS:
        options = Options(name, batch=batch, steps=8, precision="bf16", supervised=0.5, drawn_on="cuda")
        day.attempt(name, lambda o=options: preset(day, o, compiled=True, profiled=o.preset == "medium"))


def fitting(day: Day, options: Any) -> tuple[Any, Any]:
    """(trainer, its eager figures) of the largest micro-batch that fits."""
    import torch
    from lumina.kernels import model_step

    while True:
        trainer = model_step.Trainer(options)
        try:
            return trainer, model_step.time_step(options, trainer)
        except torch.OutOfMemoryError:
            if options.batch == 1:
                raise
            day.record(f"{options.preset}, micro-batch {options.batch}", out_of_memory=True)
        trainer.close()
        options = replace(options, batch=options.batch // 2)


def preset(day: Day, options: Any, compiled: bool, profiled: bool) -> None:
    from lumina.kernels import model_step

    trainer, eager = fitting(day, options)
    day.record(f"{options.preset}, eager", **figures(eager), micro_batch=trainer.options.batch)
    if profiled:
        day.attempt(f"{options.preset}, profiled", lambda: profile(day, trainer))
    if compiled:
        trainer.engine.model.compile_blocks()  # the same weights and state, as `--compile` does it
        trainer.options = replace(trainer.options, compile=True)
        found = day.attempt(f"{options.preset}, compiled", lambda: model_step.time_step(trainer.options, trainer))
        if found is not None:
            speedup = eager.seconds / found.seconds
            day.record(f"{options.preset}, compiled", **figures(found), speedup=speedup)
    trainer.close()


def figures(found: Any) -> dict[str, Any]:
    """What of a StepTime is worth a line."""
    wanted = ("parameters", "precision", "stage", "tokens", "seconds", "tokens_per_second", "mfu", "loss")
    values = asdict(found)
    return {name: values[name] for name in wanted} | {"peak_gib": found.peak / 2**30}


# --- One step's gaps ------------------------------------------------------------------------------


class Work(NamedTuple):
    """One span of device work: microseconds."""

    start: float
    end: float
    name: str


def gaps(works: Iterable[Work]) -> tuple[float, float, list[tuple[float, str, str]]]:
    """(busy, whole) microseconds, and the times in which nothing ran, longest first: (length, what ran before, what ran
    after). Work on several streams counts once."""
    ordered = sorted(works)
    if not ordered:
        return 0.0, 0.0, []
    idle: list[tuple[float, str, str]] = []
    last = ordered[0]
    for work in ordered[1:]:
        if work.start > last.end:
            idle.append((work.start - last.end, last.name, work.name))
        if work.end > last.end:
            last = work
    whole = last.end - ordered[0].start
    return whole - sum(length for length, *_ in idle), whole, sorted(idle, reverse=True)


def profile(day: Day, trainer: Any) -> None:
    """Trace one step in its steady state: the share of it in which the device was busy, its longest gaps, and a trace
    for Perfetto."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    cuda = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    batches = [trainer.batch(seed) for seed in range(3)]
    with torch.profiler.profile(activities=kinds) as traced:
        for batch in batches:  # the first pays for the profiler's start
            trainer.step([batch])
        if cuda:
            torch.cuda.synchronize()
    device = DeviceType.CUDA if cuda else DeviceType.CPU
    works = [
        Work(event.time_range.start, event.time_range.end, event.name)
        for event in traced.events()
        if event.device_type == device
        and event.time_range.end > event.time_range.start
        and not event.is_user_annotation  # a named range on the device's own line, such as the optimizer's step
    ]
    middle = min(w.start for w in works) + (max(w.end for w in works) - min(w.start for w in works)) / 3
    busy, whole, idle = gaps(work for work in works if work.start >= middle)
    kernels = len(works) / len(batches)
    day.record("profiled steps", kernels_a_step=kernels, ms=whole / 1e3, busy=busy / whole, gaps=len(idle))
    for length, before, after in idle[:8]:
        day.record("gap", us=length, after=before[:60], before=after[:60])
    path = day.results / "step.trace.json"
    traced.export_chrome_trace(str(path))
    with path.open("rb") as source, gzip.open(f"{path}.gz", "wb") as target:
        shutil.copyfileobj(source, target)
    path.unlink()
