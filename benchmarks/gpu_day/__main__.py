"""Runs the parts of the day, each within its time, and keeps the summary up to date (see benchmarks/gpu_day.sh)."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import day
import summary
from parts import NAMES, PARTS, REHEARSED_SECONDS, Part


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="benchmarks/gpu_day.sh", description="Fifteen minutes on one bare GPU.")
    add = parse.add_argument
    add("--rehearse", action="store_true", help="on a CPU, at tiny shapes: what runs, not how fast")
    add("--only", action="append", choices=NAMES, metavar="PART", help="only this part; repeat for several")
    add("--list", action="store_true", help="print the parts and end")
    add("--results", type=Path, metavar="DIR", help="benchmarks/results/NAME-OF-CARD; a rehearsal keeps none")
    add("--seconds", type=float, default=900, help="of the whole day; parts that begin later are left out (900)")
    add("--archive", type=Path, metavar="FILE", help="keep a .tar.gz of the results up to date too")
    add("--collect", type=Path, metavar="DIR", help="collect wheels for the machine with the GPU instead")
    add("--python", default="3.12", metavar="X.Y", help="that machine's Python, for --collect (3.12)")
    add("--record-losses", action="store_true", help="train on this CPU and write cpu_losses.json instead")
    return parse


def machine(rehearse: bool) -> dict[str, Any]:
    """What the day runs on; ends the program when something that it needs cannot be imported. Looked up in a process of
    its own on a GPU, because CUDA must not be initialised in this one."""
    if rehearse:
        missing = day.missing()
        found = {} if missing else day.environment()
    else:
        code = (
            f"import json, sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "import day\nmissing = day.missing()\n"
            "print(json.dumps([missing, {} if missing else day.environment()]))"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tempfile.gettempdir())
        missing, found = json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else ([run.stderr.strip()], {})
    if missing:
        sys.exit(
            "error: this cannot be imported here:\n  " + "\n  ".join(missing) + "\n"
            "Carry the missing packages as wheels: `make gpu-wheels` where there is an index, then --wheels DIR here."
        )
    return found


def run(part: Part, results: Path, rehearse: bool, seconds: float) -> tuple[str, float]:
    """How a part ended, and what it took."""
    began = time.monotonic()
    process = day.Day(part.name, results, rehearse).context.Process(
        target=day.run_part, args=(part.name, results, rehearse)
    )
    process.start()
    process.join(seconds)
    if process.is_alive():
        day.end(process)
        return "cut", time.monotonic() - began
    return ("done" if process.exitcode == 0 else "FAILED"), time.monotonic() - began


def archive(results: Path, file: Path | None) -> None:
    if file is not None:
        with tarfile.open(file, "w:gz") as tar:
            tar.add(results, results.name)


def all_parts(options: argparse.Namespace, results: Path, found: dict[str, Any], began: float) -> int:
    """Every part that was asked for; returns the exit status."""
    if options.rehearse:
        day.preload()
    head = {"command": "benchmarks/gpu_day.sh " + " ".join(sys.argv[1:]), "rehearsal": options.rehearse, **found}
    (results / day.RESULTS).unlink(missing_ok=True)
    endings: dict[str, tuple[str, float]] = {}
    for part in PARTS:
        if options.only and part.name not in options.only:
            continue
        left = options.seconds - (time.monotonic() - began)
        limit = REHEARSED_SECONDS if options.rehearse else min(part.seconds, left)
        if limit < 10:
            endings[part.name] = ("left out: no time", 0.0)
        else:
            print(f"{part.name}: {part.what}; at most {limit:.0f} s", flush=True)
            endings[part.name] = run(part, results, options.rehearse, limit)
        how, took = endings[part.name]
        print(f"  {how} after {took:.1f} s", flush=True)
        if how != "done" and (results / f"{part.name}.txt").exists():
            print("    " + "\n    ".join((results / f"{part.name}.txt").read_text(errors="replace").splitlines()[-12:]))
        (results / "summary.md").write_text(summary.render(head, endings, summary.read(results)), encoding="utf-8")
        archive(results, options.archive)
    print(f"{time.monotonic() - began:.0f} s in all; {results / 'summary.md'}", flush=True)
    return 0 if all(how == "done" for how, _ in endings.values()) else 1


def main() -> int:
    began = time.monotonic()
    options = parser().parse_args()
    if options.list:
        for part in PARTS:
            print(f"{part.name:9} {part.seconds:4} s  {part.what}  (rehearsed: {part.rehearsed})")
        print(f"{'':9} {sum(part.seconds for part in PARTS):4} s  in all, start-up not counted")
        return 0
    if options.collect:
        import wheels

        return wheels.collect(options.collect, options.python)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.rehearse or options.record_losses:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["TRITON_INTERPRET"] = "1"  # read where triton is first imported
    if options.record_losses:
        import part_losses

        return part_losses.record()
    found = machine(options.rehearse)
    if not options.rehearse and found["device"] != "cuda":
        sys.exit("error: no CUDA device is visible; --rehearse runs the parts on a CPU")
    os.environ["HF_HUB_OFFLINE"] = "1"
    print("\n".join(f"{key}: {value}" for key, value in found.items()), flush=True)
    if options.rehearse and options.results is None:
        with tempfile.TemporaryDirectory() as folder:
            return all_parts(options, Path(folder), found, began)
    name = re.sub(r"[^a-z0-9]+", "-", found["card"].lower()).strip("-")
    results = (options.results or day.ROOT / "benchmarks/results" / name).resolve()
    results.mkdir(parents=True, exist_ok=True)
    return all_parts(options, results, found, began)


if __name__ == "__main__":
    sys.exit(main())
