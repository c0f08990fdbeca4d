"""`lumina train` for tests: with a pause before every step, and with a fault planted in one of them.

PAUSE is the pause in seconds: a run then lasts as long as a test needs, at no cost. FAULT is KIND:RANK:STEP: before
that step (counted from this start) that rank raises, is killed for want of memory, reads from address 0, or hangs.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any


def fault(kind: str) -> None:
    if kind == "raise":
        raise RuntimeError("a planted exception")
    if kind == "oom":
        group = Path(os.environ["OOM_GROUP"])
        (group / "cgroup.procs").write_text("0")  # this process
        hoard = []
        while True:
            hoard.append(b"x" * (16 << 20))
    if kind == "segv":
        ctypes.string_at(0)
    if kind == "hang":
        time.sleep(10_000)


def main() -> int:
    from lumina.cli import main as command
    from lumina.train.deepspeed import engine

    pause = float(os.environ.get("PAUSE", "0"))
    kind, rank, step = (os.environ.get("FAULT") or "none:0:0").split(":")
    set_lr = engine.Engine.set_lr
    done = {"steps": 0}

    def paced(self: engine.Engine, lr: float) -> None:
        time.sleep(pause)
        done["steps"] += 1
        if kind != "none" and os.environ["RANK"] == rank and done["steps"] == int(step):
            fault(kind)
        set_lr(self, lr)

    patched: Any = engine.Engine
    patched.set_lr = paced
    return command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
