"""Run every command block of the documents: python -m tests.documents [DOCUMENT …]

Each document has a fresh folder. Ends with code 1 at the first block that fails, naming document and line.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from tests.documents.blocks import blocks, documents
from tests.documents.runs import BlockError, Runs
from tests.documents.workplace import make


def main() -> int:
    asked = [Path(name).resolve() for name in sys.argv[1:]] or documents()
    found = {document: blocks(document) for document in asked}  # all of them, before minutes are spent on some
    ran = skipped = 0
    with tempfile.TemporaryDirectory(prefix="lumina-documents-") as place:
        sample = make(Path(place) / "sample")
        for number, (document, read) in enumerate(found.items()):
            folder = Path(place) / str(number)
            shutil.copytree(sample, folder, symlinks=True)
            with Runs(folder, lambda text: print(text, flush=True)) as runs:
                try:
                    for block in read:
                        runs.run(block)
                except BlockError as failed:
                    print(f"FAILED {failed}", file=sys.stderr)
                    return 1
                ran, skipped = ran + runs.run_blocks, skipped + runs.skipped_blocks
            shutil.rmtree(folder)
            print(f"{document.name}: {runs.run_blocks} blocks ran, {runs.skipped_blocks} are marked", flush=True)
    print(f"{ran + skipped} blocks of commands: {ran} ran, {skipped} are marked with the reason")
    return 0


if __name__ == "__main__":
    sys.exit(main())
