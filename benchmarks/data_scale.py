"""Preparing, validating and loading a large chat JSONL: speed, and memory that does not grow with the data.

    python benchmarks/data_scale.py FILE [--gigabytes 2] [--workers 2] [--model-tokens-per-s 560]
    python benchmarks/data_scale.py FILE --seq-length 1000000 --ranks 1 2 8 [--gigabytes 0.25]
    python benchmarks/data_scale.py FILE --before CHECKOUT [--gigabytes 2] [--workers 2] [--repeat 3]

FILE's lines are repeated, each copy's text made different, until the input has the size asked for; then again at a
quarter of it. For both sizes: tokens/s of preparing and the largest resident memory of a worker and of the parent,
then validation's time over preparing's, then the loader's tokens/s and the growth of its private memory over an epoch.
The last line sums up.

With --ranks, one size: preparing, and in it the time of best-fit packing; then, each in a process of its own, the
loader of the last of P ranks that share each row, as training has it (it looks its rows through for damage): the rows'
tokens/s, and by how much its private memory rose at most over what it was before the first one, when steps take so long
that all rows that it reads ahead are there. With --joined the input is one conversation, with all messages.

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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import orjson
import psutil

from lumina.chat import Tokenizer
from lumina.config import Config, load
from lumina.data import GlobalOrder, Loader, PackedDataset, Part, prepare, validate
from lumina.data.preparing.packing import pack

MIB = 1 << 20
SETTINGS = {"packing": True, "overlong": "split"}


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


def join(path: Path) -> None:
    """Makes one record of a file's: a conversation with all their messages."""
    records = map(orjson.loads, path.read_bytes().splitlines())
    path.write_bytes(orjson.dumps({"messages": [message for record in records for message in record["messages"]]}))


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


class PrivatePeak:
    """Samples this process's private memory every 2 ms while a block runs: by how many MiB it rose at most."""

    def __enter__(self) -> PrivatePeak:
        self._before = self._most = private_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            self._most = max(self._most, private_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.mib = (self._most - self._before) / MIB


def load_part(path: Path, settings: Config, ranks: int, steps: int) -> None:
    """Prints the loader's figures on the last of `ranks` ranks that share each row of a prepared file."""
    dataset = prepare([path], settings, Tokenizer.load())
    assert isinstance(dataset, PackedDataset)
    order = GlobalOrder(dataset.num_samples, 1, seed=1, fingerprint=dataset.fingerprint)
    shared = {"rank": 0, "world": 1, "micro_batch_size": 1, "part": Part(ranks - 1, ranks)}
    checked = {"replace_corrupt": True, "vocab_size": settings.vocab_size}
    # The first batch imports what makes tensors.
    warm = dataset.batch([0], Part(0, -(-int(dataset.tokens_per_sample[0]) // 1024)))
    warm.torch()
    with PrivatePeak() as peak:
        for _ in Loader(dataset, order, start_step=0, stop_step=min(steps, 8), **shared, **checked):
            time.sleep(0.5)
    start = time.perf_counter()
    tokens = sum(one.tokens for one in Loader(dataset, order, start_step=0, stop_step=steps, **shared, **checked))
    seconds = time.perf_counter() - start
    print(
        f"ranks={ranks} row_tokens={int(dataset.tokens_per_sample.max())} rows={steps} "
        f"rows_tokens_per_s={tokens / seconds:.0f} private_growth_mib={peak.mib:.0f}",
        flush=True,
    )


def measure_rows(path: Path, settings: Config, workers: int, ranks: Sequence[int]) -> None:
    """Prepares a file with few and long rows, packs its chunks once more, and loads them as one of `ranks` ranks."""
    with Watch() as watch:
        start = time.perf_counter()
        dataset = prepare([path], settings, Tokenizer.load(), workers=workers)
        seconds = time.perf_counter() - start
    lengths = np.concatenate(list(map(dataset.document_lengths, range(dataset.num_samples)))).astype(np.int32)
    start = time.perf_counter()
    rows = pack(lengths, settings.seq_length)
    packing = time.perf_counter() - start
    assert int(rows.max()) + 1 == dataset.num_samples
    print(
        f"bytes={path.stat().st_size} tokens={dataset.account['tokens']} seq_length={settings.seq_length} "
        f"chunks={len(lengths)} samples={dataset.num_samples} fill={dataset.account['fill']:.4f} "
        f"prepare_s={seconds:.1f} of_it_packing_s={packing:.3f} "
        f"worker_mib={watch.child:.0f} parent_mib={watch.parent:.0f}",
        flush=True,
    )
    for count in ranks:
        steps = min(dataset.num_samples, 20)
        command = [sys.executable, __file__, str(path), "--seq-length", str(settings.seq_length)]
        command += ["--load", str(settings.cache_dir), str(count), str(steps)]
        subprocess.run(command, check=True)


def measure(path: Path, workers: int, folder: str, seq_length: int) -> tuple[float, float, float, float]:
    """Prints a size's figures. Returns (tokens/s, worker MiB, validation over preparing, loader tokens/s)."""
    given = {"seq_length": seq_length, "cache_dir": str(Path(folder) / f"cache-{path.stat().st_size}")}
    settings = load("nano", {**SETTINGS, **given})
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
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--ranks", type=int, nargs="+", metavar="P", help="load as one of P ranks that share each row")
    parser.add_argument("--joined", action="store_true", help="with --ranks: one conversation")
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load is not None:
        cache, ranks, steps = arguments.load
        settings = load("nano", {**SETTINGS, "seq_length": arguments.seq_length, "cache_dir": cache})
        load_part(arguments.file, settings, int(ranks), int(steps))
        return
    if arguments.ranks:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            path = Path(folder) / "input.jsonl"
            grow(arguments.file, path, int(arguments.gigabytes * 1e9))
            if arguments.joined:
                join(path)
            settings = load("nano", {**SETTINGS, "seq_length": arguments.seq_length, "cache_dir": f"{folder}/cache"})
            measure_rows(path, settings, arguments.workers, arguments.ranks)
        return
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
            results.append(measure(path, arguments.workers, folder, arguments.seq_length))
    (_, small, _, _), (rate, large, ratio, loaded) = results
    times = loaded / arguments.model_tokens_per_s
    print(
        f"tokens_per_s={rate:.0f} worker_mib {small:.0f} -> {large:.0f} at 4x the data, "
        f"validate_over_prepare={ratio:.2f}, loader {times:.0f}x the model"
    )


if __name__ == "__main__":
    main()
