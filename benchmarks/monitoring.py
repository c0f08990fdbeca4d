"""What the health monitor costs a training step, at the debug preset.

    python benchmarks/monitoring.py [--steps 6] [--tokens 512]

Everything that the monitor does in a step is timed by itself, with full baselines: the spike detector, every step rule,
the record in metrics.jsonl, the requests folder, and a hundredth of the layers' statistics (they are made every 100
steps). That is put over the time of a real training step in the same process, measured in turn with it: a
difference of two step times would drown in their noise. The last line is the overhead; the bar is 1%.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a training step: few make the share large")
    arguments = parser.parse_args()
    from shapes import debug_trainer

    trainer, batch = debug_trainer(arguments.tokens)

    from lumina.config import load
    from lumina.monitor import EventLog, MetricsFile, StepRecord
    from lumina.train.deepspeed import LayerStats
    from lumina.train.health import Health, LayerObservation, StepObservation
    from lumina.train.recovery.spikes import SpikeDetector

    draw = random.Random(0)
    config = load("debug")
    with tempfile.TemporaryDirectory() as folder:
        metrics, events = MetricsFile(Path(folder) / "metrics.jsonl", 0), EventLog(Path(folder) / "events.jsonl")
        detector, health = SpikeDetector(config), Health(config, events)

        def monitor(step: int) -> None:
            loss, norm = draw.gauss(2, 0.1), draw.gauss(1, 0.1)
            if detector.classify(loss, norm) is None and norm < detector.norm_limit():
                detector.accept(loss, norm)
            status = health.step(StepObservation(step, loss, norm, True, draw.gauss(1000, 9), 0.0, 1.0, 2**30))
            list((Path(folder) / "requests").glob("save-*.json"))
            metrics.step(
                StepRecord(step, 1, 1, 1, loss, 1e-4, norm, 512, 512, 1e3, 2**30, 2**34, "Mem", status, time.time())
            )

        for step in range(1, 5000):  # past every baseline's length, the plateau rule's too
            monitor(step)
        steps, layers, monitors = [], [], []
        stats = LayerStats(trainer)
        for number in range(arguments.steps + 1):
            began = time.perf_counter()
            trainer.set_lr(1e-5)
            trainer.accumulate(batch, 1 / arguments.tokens, last=True)
            computed = time.perf_counter()
            stats.before()
            read = time.perf_counter()
            trainer.step()
            stepped = time.perf_counter()
            health.layers(LayerObservation(number, stats.after()))
            ended = time.perf_counter()
            for extra in range(400):
                monitor(5000 + 400 * number + extra)
            if number:
                steps.append(computed - began + stepped - read)
                layers.append(read - computed + ended - stepped)
                monitors.append((time.perf_counter() - ended) / 400)
        metrics.close()
    step, layer, own = (statistics.median(values) for values in (steps, layers, monitors))
    print(
        f"training step {step:.3f} s, monitor {1e3 * own:.3f} ms a step, layers' statistics {layer:.3f} s per 100 steps"
    )
    print(f"overhead {(own + layer / 100) / step:.2%} of a step")


if __name__ == "__main__":
    main()
