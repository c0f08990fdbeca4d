"""What ranks tell each other through the store: nothing of an earlier try or an earlier run is taken for news."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_RANK = """
import json, os, sys
import torch.distributed as dist
from lumina.train.agreement import exchange
from lumina.train.deepspeed import Ranks
from lumina.train.recovery.out_of_memory import StepReports
child = os.fork()
rank = 0 if child else 1
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
found = []
for start in ("one", "two"):  # two runs of the same processes
    ranks = Ranks(rank, 2, rank, 2, start)
    reports = StepReports(ranks, enabled=True, seconds=1.0)
    for batch_size in (4, 2):  # the step is taken again with half; then rank 1 has memory enough, and says so late
        tried = (start, batch_size)
        first = tried == ("one", 4)
        if rank == 0 or first:
            found.append(reports.all_clean(3, batch_size, clean=True))
        dist.barrier()
    if rank == 0 or start == "one":
        states = exchange("lumina/emergency", {"rank": rank}, ranks, 1.0)
        found.append(None if states is None else len(states))
    dist.barrier()
if child:
    os.waitpid(child, 0)
    print(json.dumps(found), flush=True)
os._exit(0)
"""


def test_what_was_said_before_is_no_news(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RANK, str(tmp_path / "meeting")],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, False, 2, False, False, None], "both ran out once; nobody spoke later"
