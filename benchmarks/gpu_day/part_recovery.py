"""What happens when memory runs out, and what a save costs: real runs of `lumina train`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from day import TINY, Day, run_command, write_conversations


def main(day: Day) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = write_conversations(Path(folder) / "data.jsonl", 40 if day.rehearse else 4000)
        day.attempt("out of memory", lambda: out_of_memory(day, data))
        day.attempt("saves", lambda: saves(day, data))


def train(day: Day, data: Path, name: str, preset: str, *settings: str, change: Any = None) -> int:
    """A run's exit code."""
    sets = ["num_workers=1", "epochs=100", "live_view=false", *(TINY if day.rehearse else ()), *settings]
    line = ["train", "--config", preset, "--train-data", str(data), "--output-dir", str(data.parent)]
    line += ["--experiment-name", name, *(word for pair in sets for word in ("--set", pair))]
    process = day.context.Process(target=run_command, args=(line, str(day.results / f"{day.part}.txt"), change))
    process.start()
    process.join()
    return int(process.exitcode)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def little_memory() -> None:
    """3 GB of the card, which a micro-batch of 256 samples of nano does not fit into."""
    import torch

    torch.cuda.set_per_process_memory_fraction(3e9 / torch.cuda.get_device_properties(0).total_memory)


def planted() -> None:
    """The first micro-batch of the second step runs out of memory, once."""
    import torch

    from lumina.train.deepspeed import Engine

    accumulate, calls = Engine.accumulate, []

    def once(engine: Any, *words: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("planted: out of memory")
        return accumulate(engine, *words, **more)

    Engine.accumulate = once


def out_of_memory(day: Day, data: Path) -> None:
    """The run goes on with smaller micro-batches and the same global batch, and ends well."""
    size = 2 if day.rehearse else 256
    settings = [f"batch_size={size}", "gradient_accumulation_steps=1", "max_steps=5"]
    code = train(day, data, "oom", "nano", *settings, change=planted if day.rehearse else little_memory)
    events = [e for e in lines(data.parent / "oom/events.jsonl") if "out-of-memory" in json.dumps(e)]
    steps = [r for r in lines(data.parent / "oom/metrics.jsonl") if r["kind"] == "step"]
    peak = max((r["memory"] for r in steps), default=0) / 2**30
    ok = code == 0 and len(steps) == 5 and bool(events)
    day.check("out of memory and rebuild", ok, exit_code=code, halvings=len(events), steps=len(steps), peak_gib=peak)


def saves(day: Day, data: Path) -> None:
    """Seconds that the loop spends in the first and in the second save of a run, against a step's."""
    settings = ["batch_size=1", "gradient_accumulation_steps=1", "max_steps=9", "save_every_n_batches=3", "keep_last=1"]
    code = train(day, data, "saves", "nano" if day.rehearse else "medium", *settings)
    steps = [r for r in lines(data.parent / "saves/metrics.jsonl") if r["kind"] == "step"]
    # A save comes after its step's record: its seconds are in the next one's.
    spent = {r["step"]: r["seconds"].get("saving", 0.0) for r in steps}
    times = {r["step"]: r["time"] for r in steps}
    usual = min(times[n] - times[n - 1] for n in times if n > 2)
    day.check(
        "first and second save", code == 0 and len(steps) == 9, exit_code=code,
        first_s=spent.get(4), second_s=spent.get(7), shortest_step_s=usual,
    )  # fmt: skip
