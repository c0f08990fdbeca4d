"""Preparing, validating and loading a large chat JSONL: speed, and memory that does not grow with the data.

    python benchmarks/data_scale.py FILE [--gigabytes 2] [--workers 2] [--model-tokens-per-s 560]
    python benchmarks/data_scale.py FILE --before CHECKOUT [--gigabytes 2] [--workers 2] [--repeat 3]

FILE's lines are repeated, each copy's text made different, until the input has the size asked for; then again at a
quarter of it. For both sizes: tokens/s of preparing and the largest resident memory of a worker and of the parent,
then validation's time over preparing's, then the loader's tokens/s and the growth of its private memory over an epoch.
The last line sums up.

With --before, both checkouts prepare and validate the input in turns (benchmarks/prepare.py), and the ratios of their
CPU seconds are printed, this one's in the denominator.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from lumina.chat import Tokenizer
from lumina.config import load
from lumina.data import GlobalOrder, Loader, PackedDataset, prepare, validate

MIB = 1 << 20
SETTINGS = {"seq_length": 1024, "packing": True, "overlong": "split"}


class Watch:
    """Samples memory every 20 ms while a block runs: the peak of the parent and of its largest child, in MiB."""

    def __enter__(self) -> Watch:
        self.parent = self.child = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def _run(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.02):
            self.parent = max(self.parent, me.memory_info().rss / MIB)
            for child in me.children(recursive=True):
                try:
                    self.child = max(self.child, child.memory_info().rss / MIB)
                except psutil.NoSuchProcess:
                    continue

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def grow(source: Path, target: Path, size: int) -> None:
    """Writes copies of `source` until `target` has `size` bytes; copy k's spaces after sentences carry k."""
    text = source.read_bytes()
    with open(target, "wb") as out:
        copy = 0
        while out.tell() < size:
            out.write(text.replace(b". ", b" %d. " % copy))
            copy += 1


def private_bytes() -> int:
    """Memory of this process that is not file pages: a memory map's pages are the system's to take back."""
    info = psutil.Process().memory_info()
    return int(info.rss - info.shared)


def load_epoch(dataset: PackedDataset) -> tuple[float, float]:
    """(tokens/s over one epoch, growth of private memory in MiB from its first tenth to its end)."""
    order = GlobalOrder(dataset.num_samples, 8, seed=1, fingerprint=dataset.fingerprint)
    steps = min(order.steps_per_epoch, 20_000)
    loader = Loader(dataset, order, rank=0, world=1, micro_batch_size=2, start_step=0, stop_step=steps)
    tokens, early = 0, 0
    start = time.perf_counter()
    for data in loader:
        tokens += data.tokens
        if data.step == steps // 10:
            early = private_bytes()
    return tokens / (time.perf_counter() - start), (private_bytes() - early) / MIB


def measure(path: Path, workers: int, folder: str) -> tuple[float, float, float, float]:
    """Prints a size's figures. Returns (tokens/s, worker MiB, validation over preparing, loader tokens/s)."""
    settings = load("nano", {**SETTINGS, "cache_dir": str(Path(folder) / f"cache-{path.stat().st_size}")})
    with Watch() as watch:
        start = time.perf_counter()
        dataset = prepare([path], settings, Tokenizer.load(), workers=workers)
        seconds = time.perf_counter() - start
    rate = dataset.account["tokens"] / seconds
    start = time.perf_counter()
    validate([str(path)], Tokenizer.load(), workers=workers)
    ratio = (time.perf_counter() - start) / seconds
    loaded, growth = load_epoch(dataset)
    print(
        f"bytes={path.stat().st_size} tokens={dataset.account['tokens']} prepare_s={seconds:.1f} "
        f"tokens_per_s={rate:.0f} fill={dataset.account['fill']:.4f} "
        f"worker_mib={watch.child:.0f} parent_mib={watch.parent:.0f} validate_over_prepare={ratio:.2f} "
        f"loader_tokens_per_s={loaded:.0f} loader_growth_mib={growth:.1f}",
        flush=True,
    )
    return rate, watch.child, ratio, loaded


def main() -> None:
    """Measures a quarter of the size, then all of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model-tokens-per-s", type=float, default=560.0, help="what the model of `debug` consumes")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    parser.add_argument("--repeat", type=int, default=3, help="turns with --before")
    arguments = parser.parse_args()
    if arguments.before is not None:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            path = Path(folder) / "input.jsonl"
            grow(arguments.file, path, int(arguments.gigabytes * 1e9))
            for more in ([], ["--validate"]):
                command = [sys.executable, str(Path(__file__).with_name("prepare.py")), str(path), *more]
                command += ["--before", str(arguments.before), "--workers", str(arguments.workers)]
                subprocess.run([*command, "--repeat", str(arguments.repeat)], check=True)
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        results = []
        for share in (0.25, 1.0):
            path = Path(folder) / f"{share}.jsonl"
            grow(arguments.file, path, int(share * arguments.gigabytes * 1e9))
            results.append(measure(path, arguments.workers, folder))
    (_, small, _, _), (rate, large, ratio, loaded) = results
    times = loaded / arguments.model_tokens_per_s
    print(
        f"tokens_per_s={rate:.0f} worker_mib {small:.0f} -> {large:.0f} at 4x the data, "
        f"validate_over_prepare={ratio:.2f}, loader {times:.0f}x the model"
    )


if __name__ == "__main__":
    main()
