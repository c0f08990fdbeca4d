"""How long a save keeps the training waiting, written beside it against written while it waits, at the debug preset.

    python benchmarks/save_stall.py --folder DIR [--rounds 5]

One process trains a step between the saves, so that the writer thread has the loop's competition. `async` is the time
that the loop spends in a save before it goes on; `sync` is the same save waited for (written, flushed, hashed, named).
They take turns; the first of each is left out, because it allocates the snapshot's memory. The last line is the ratio
of the medians; the bar is 0.10.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where checkpoints go: the disk that is measured (a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a training step")
    arguments = parser.parse_args()
    from shapes import debug_trainer

    trainer, batch = debug_trainer(arguments.tokens)

    from lumina.checkpoint import Retention, SaveJob, Saver, SaveTarget, StagingBuffer, TrainerState
    from lumina.train.saving.snapshot import take_snapshot

    def train() -> float:
        began = time.perf_counter()
        trainer.set_lr(1e-5)
        trainer.accumulate(batch, 1 / arguments.tokens, last=True)
        trainer.step()
        return time.perf_counter() - began

    seconds: dict[str, list[float]] = {"async": [], "sync": [], "alone": [], "beside": []}
    copies = StagingBuffer(trainer.device)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        saver = Saver(0, 1, "bench", 600)
        train()
        for step in range(1, 2 * arguments.rounds + 3):
            way = "async" if step % 2 else "sync"
            seconds["alone"].append(train())
            began = time.perf_counter()
            snapshot = take_snapshot(trainer, TrainerState(step=step), copies)
            saver.begin(SaveJob(snapshot, [SaveTarget("checkpoint", Path(folder), Retention(1))]))
            if way == "sync":
                saver.wait()
            took = time.perf_counter() - began
            if way == "async" and saver.busy:
                seconds["beside"].append(train())
            saver.wait()
            (outcome,) = saver.outcomes()
            assert outcome.path is not None, outcome.error
            print(
                f"{way:<5} {took:7.3f} s   (written in {outcome.seconds:.3f} s, {snapshot.bytes / 2**20:.0f} MiB)",
                flush=True,
            )
            if step > 2:
                seconds[way].append(took)
    middle = {name: statistics.median(values) for name, values in seconds.items() if values}
    if "beside" in middle:
        print(f"a training step of {middle['alone']:.3f} s takes {middle['beside']:.3f} s beside the writer")
    print(f"ratio {middle['async'] / middle['sync']:.3f}  (async {middle['async']:.3f} s, sync {middle['sync']:.3f} s)")


if __name__ == "__main__":
    main()
