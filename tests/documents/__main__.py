"""Run every command block of the documents: python -m tests.documents [DOCUMENT …]

Each document has a fresh folder. Ends with code 1 at the first block that fails, naming document and line. Prints what
each document took: seconds on the clock, and of the processors as far as its processes were waited for.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.documents.blocks import blocks, documents
from tests.documents.runs import BlockError, Runs
from tests.documents.warm import WarmServer
from tests.documents.workplace import make


def main() -> int:
    asked = [Path(name).resolve() for name in sys.argv[1:]] or documents()
    found = {document: blocks(document) for document in asked}  # all of them, before minutes are spent on some
    ran = skipped = 0
    with tempfile.TemporaryDirectory(prefix="lumina-documents-") as place, WarmServer() as warm:
        whole, clock = Clock(warm), Clock(warm)
        sample = make(Path(place) / "sample", warm)
        print(f"the sample's folder: {clock.read()}", flush=True)
        for number, (document, read) in enumerate(found.items()):
            folder = Path(place) / str(number)
            shutil.copytree(sample, folder, symlinks=True)
            with Runs(folder, lambda text: print(text, flush=True), warm) as runs:
                try:
                    for block in read:
                        runs.run(block)
                except BlockError as failed:
                    print(f"FAILED {failed}", file=sys.stderr)
                    return 1
                ran, skipped = ran + runs.run_blocks, skipped + runs.skipped_blocks
            shutil.rmtree(folder)
            counts = f"{runs.run_blocks} blocks ran, {runs.skipped_blocks} are marked"
            print(f"{document.name}: {counts}: {clock.read()}", flush=True)
        print(f"{ran + skipped} blocks of commands: {ran} ran, {skipped} are marked with the reason: {whole.read()}")
    return 0


class Clock:
    """Seconds since it was last read, on the clock and of the processors in processes that ended since."""

    def __init__(self, warm: WarmServer) -> None:
        self._warm = warm
        self._started = self._now()

    def read(self) -> str:
        before, self._started = self._started, self._now()
        seconds, processor = (now - then for now, then in zip(self._started, before, strict=True))
        return f"{seconds:.1f} s, {processor:.1f} s of the processors"

    def _now(self) -> tuple[float, float]:
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return times.elapsed, own + self._warm.seconds()


if __name__ == "__main__":
    sys.exit(main())
