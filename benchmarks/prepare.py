"""Preparing a chat JSONL (read, template, tokenise, mask, pack, write): Lumina beside a peer's script.

    python benchmarks/prepare.py FILE [--workers 2] [--seq-length 1024] [--repeat 3] [--peer SCRIPT]
    python benchmarks/prepare.py FILE --before CHECKOUT [--validate] [--seq-length 256] [--repeat 10]

The peer is any script that takes FILE and a process count and prints `tokens_per_s=N`, such as one around TRL's dataset
preparation. SCRIPT and PYTHON may also come from LUMINA_PEER_PREP and LUMINA_PEER_PYTHON. Lumina's time is that of
`lumina prepare`'s work into an empty cache, its worker processes' start included; tokens are those of the template's
rendering. The last line is the ratio. An input under 48 MB is prepared in one process: starting a second one takes
longer than it saves.

With --before, another checkout of Lumina prepares (or with --validate, validates) the file in turns with this one, in
processes of their own. The figure is CPU seconds, the least of all turns, so that a shared machine tells as well as an
idle one.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lumina.chat import Tokenizer
from lumina.config import load
from lumina.data import prepare, validate

SETTINGS = {"packing": True, "overlong": "split"}


def ours(path: Path, workers: int, seq_length: int) -> float:
    """Prepares once into an empty cache; prints the account's figures; returns tokens/s."""
    with tempfile.TemporaryDirectory() as cache:
        settings = load("nano", {**SETTINGS, "seq_length": seq_length, "cache_dir": cache})
        start = time.perf_counter()
        dataset = prepare([path], settings, Tokenizer.load(), workers=workers)
        seconds = time.perf_counter() - start
        account = dataset.account
        lost = sum(account["tokens_dropped"].values())
        print(
            f"lumina rows={account['conversations']} tokens={account['tokens']} lost={lost} seconds={seconds:.2f} "
            f"packed_rows={dataset.num_samples} fill={account['fill']:.4f} "
            f"tokens_per_s={account['tokens'] / seconds:.0f}",
            flush=True,
        )
        start = time.perf_counter()
        prepare([path], settings, Tokenizer.load(), workers=workers)
        print(f"lumina reuse_seconds={time.perf_counter() - start:.3f}", flush=True)
        return float(account["tokens"]) / seconds


def peer(script: str, python: str, path: Path, workers: int) -> float:
    """Runs the peer's script once; passes its last line on; returns its tokens/s."""
    done = subprocess.run([python, script, str(path), str(workers)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the peer failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    line = done.stdout.strip().splitlines()[-1]
    found = re.search(r"tokens_per_s=([\d.]+)", line)
    if found is None:
        sys.exit(f"the peer printed no tokens_per_s: {line}")
    print(line, flush=True)
    return float(found.group(1))


def cpu_seconds() -> float:
    """CPU time of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def one(path: Path, workers: int, seq_length: int, validating: bool) -> None:
    """Prints the CPU seconds of preparing or validating once, and the tokens."""
    tokenizer = Tokenizer.load()
    tokenizer.encode(" ")
    start = cpu_seconds()
    if validating:
        tokens = validate([str(path)], tokenizer, workers=workers).account.tokens
        print(f"{cpu_seconds() - start} {tokens}")
        return
    with tempfile.TemporaryDirectory() as cache:
        settings = load("nano", {**SETTINGS, "seq_length": seq_length, "cache_dir": cache})
        start = cpu_seconds()
        dataset = prepare([path], settings, tokenizer, workers=workers)
        print(f"{cpu_seconds() - start} {dataset.account['tokens']}")


def compare(before: Path, path: Path, workers: int, seq_length: int, repeat: int, validating: bool) -> None:
    """Runs `one` with both checkouts in turns, and prints the ratio of the least times."""
    here = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-P", __file__, str(path.resolve()), "--one", "--seq-length", str(seq_length)]
    command += ["--validate"] if validating else []
    least: dict[Path, tuple[float, int]] = {}
    for _ in range(repeat):
        for checkout in (before.resolve(), here):
            environment = {**os.environ, "PYTHONPATH": str(checkout)}
            done = subprocess.run(
                [*command, "--workers", str(workers)], cwd=checkout, env=environment, capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(f"{checkout} failed:\n{done.stderr[-2000:]}")
            seconds, tokens = done.stdout.split()
            least[checkout] = min(least.get(checkout, (float("inf"), 0)), (float(seconds), int(tokens)))
    for checkout, (seconds, tokens) in least.items():
        print(f"{checkout}: cpu_seconds={seconds:.3f} tokens={tokens}")
    what = "validating" if validating else f"preparing seq_length={seq_length}"
    print(f"{what} ratio={least[before.resolve()][0] / least[here][0]:.3f}")


def main() -> None:
    """Runs both and prints the ratio of their best runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    parser.add_argument("--validate", action="store_true", help="with --before: validating instead of preparing")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer", default=os.environ.get("LUMINA_PEER_PREP"))
    parser.add_argument("--peer-python", default=os.environ.get("LUMINA_PEER_PYTHON", sys.executable))
    arguments = parser.parse_args()
    data = (arguments.file, arguments.workers, arguments.seq_length)
    if arguments.one:
        one(*data, arguments.validate)
        return
    if arguments.before is not None:
        compare(arguments.before, *data, arguments.repeat, arguments.validate)
        return
    best = max(ours(*data) for _ in range(arguments.repeat))
    if arguments.peer is None:
        print(f"no peer given (--peer or LUMINA_PEER_PREP); lumina alone: {best:.0f} tokens/s")
        return
    if not Path(arguments.peer).is_file():
        sys.exit(f"the peer's script {arguments.peer} does not exist")
    theirs = max(
        peer(arguments.peer, arguments.peer_python, arguments.file, arguments.workers) for _ in range(arguments.repeat)
    )
    print(f"ratio={best / theirs:.2f}")


if __name__ == "__main__":
    main()
