"""Fuzzers of the doors, on hypothesis: python -m tests.adversary.fuzz --minutes 30 [--door NAME …]

Each door has processes of its own, one after another, for a minute or less. Before a process tries a text it writes it
down: where it ends otherwise than by itself, or is not done in HANG seconds, the text is in the corpus. So it is where
the reader raises what no user should see. The corpus is read again by every `make test`. What a template or a tokenizer
may do without end, commands end (lumina/chat/hf/bounded.py); these doors run them here, to see what else they do.

Exit code 0 when nothing was found, 1 otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.adversary.doors import CORPUS, DOORS, EXPECTED, Door

HANG = 60.0  # seconds for one text, on a machine that does other things too
MEMORY = 8 << 30  # bytes of addresses: a text that takes more of them is a finding too
_SLICE = 60.0  # seconds for one process
_MOST = 1 << 20  # bytes of a text


def texts(door: Door) -> st.SearchStrategy[bytes]:
    """Seeds with up to eight places changed: cut, doubled, overwritten by bytes or words of the format; and bytes."""
    words = st.sampled_from(door.words) if door.words else st.just(b"")
    inserted = st.one_of(
        words, st.binary(max_size=8), st.tuples(words, st.integers(1, 3000)).map(lambda t: t[0] * t[1])
    )
    change = st.tuples(st.floats(0, 1), st.integers(0, 40), inserted)

    def changed(drawn: tuple[bytes, list[tuple[float, int, bytes]]]) -> bytes:
        text, changes = drawn
        for where, length, new in changes:
            at = int(where * len(text))
            text = text[:at] + new + text[at + length :]
        return text[:_MOST]

    mutated = st.tuples(st.sampled_from(door.seeds()), st.lists(change, min_size=1, max_size=8)).map(changed)
    return st.one_of(mutated, mutated, mutated, st.binary(max_size=200))


def attempt(door: Door, text: bytes) -> str | None:
    """What a reader raises that no user should see; None where it reads or refuses the text."""
    folder = Path(tempfile.mkdtemp(prefix="lumina-fuzz-"))
    try:
        door.read(text, folder)
    except EXPECTED as error:
        return None if str(error).strip() else f"{type(error).__name__} says nothing"
    except Exception:
        return traceback.format_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return None


def keep(name: str, text: bytes) -> Path:
    """Enter a text into the corpus of a door."""
    path = CORPUS / name / hashlib.sha256(text).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    return path


def work(name: str, until: float, place: Path, number: int) -> None:
    """Try texts at one door until a time; `place`: where the text that is tried and the counts are written."""
    door, found, tried = DOORS[name], dict[str, str](), 0
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    @seed(number)
    @settings(
        max_examples=100, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(texts(door))
    def run(text: bytes) -> None:
        nonlocal tried
        if time.time() > until:
            return
        (place / "text").write_bytes(text)
        tried += 1
        wrong = attempt(door, text)
        if wrong is not None:
            where = wrong.strip().splitlines()
            key = "\n".join(line for line in where[-7:] if line.lstrip().startswith("File")) + where[-1].split(":")[0]
            if key not in found:  # one text for each place that fails
                found[key] = wrong
                print(f"{name}: {keep(name, text)}\n{wrong}", flush=True)

    while time.time() < until:
        run()
        number += 1
        run = seed(number)(run)
        (place / "counts").write_text(json.dumps({"tried": tried, "found": len(found)}))
    (place / "counts").write_text(json.dumps({"tried": tried, "found": len(found)}))


def supervise(name: str, seconds: float, number: int) -> tuple[int, int]:
    """(texts tried, findings) of one process at a door; a crash is a finding, and a hang where nothing would end it."""
    with tempfile.TemporaryDirectory(prefix="lumina-fuzz-") as folder:
        place = Path(folder)
        words = ["--work", name, "--until", str(time.time() + seconds), "--place", folder, "--number", str(number)]
        child = subprocess.Popen([sys.executable, "-m", "tests.adversary.fuzz", *words])
        written, last = None, time.monotonic()
        while child.poll() is None:
            time.sleep(0.2)
            now = (place / "text").stat().st_mtime_ns if (place / "text").exists() else None
            if now != written:
                written, last = now, time.monotonic()
            if time.monotonic() - last > HANG + (60 if now is None else 0):  # imports take their time
                child.kill()
                child.wait()
                if now is None:
                    raise SystemExit(f"{name}: its reader could not be loaded in time")
                if DOORS[name].bounded:
                    print(f"{name}: a text that its bound would end", flush=True)
                    return 1, 0
                print(f"{name}: no end in {HANG:.0f} s: {keep(name, (place / 'text').read_bytes())}", flush=True)
                return 1, 1
        counts = json.loads((place / "counts").read_text()) if (place / "counts").exists() else {"tried": 0, "found": 0}
        if child.returncode:
            text = (place / "text").read_bytes() if (place / "text").exists() else b""
            print(f"{name}: the process ended with {child.returncode}: {keep(name, text)}", flush=True)
            return counts["tried"], counts["found"] + 1
        return counts["tried"], counts["found"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--door", nargs="+", choices=DOORS, default=list(DOORS))
    parser.add_argument("--number", type=int, default=int(time.time()), help="the first seed (the time)")
    for hidden, kind in (("--work", str), ("--until", float), ("--place", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    given_ = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if given_.work:
        work(given_.work, given_.until, given_.place, given_.number)
        return 0
    end = time.monotonic() + 60 * given_.minutes
    slice_ = min(_SLICE, 60 * given_.minutes / len(given_.door))
    totals = {name: [0, 0] for name in given_.door}
    number = given_.number
    while time.monotonic() < end:
        for name in given_.door:
            left = end - time.monotonic()
            if left <= 0:
                break
            number += 100_000
            tried, found = supervise(name, min(slice_, left), number)
            totals[name][0] += tried
            totals[name][1] += found
    for name, (tried, found) in totals.items():
        print(f"{name:12} {tried:9,} texts, {found} finding(s)")
    return 1 if any(found for _, found in totals.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
