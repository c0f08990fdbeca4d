"""Agreement between ranks: before the first step through the process group's key-value store, then in each step's sum.

step_sums: what every rank contributes to a step. store: what one rank decides or all of them exchange, without a
collective, as long as it takes. start: what must be the same on every rank before the first step.
"""

from lumina.train.agreement.start import (
    agree_on_contents,
    agree_on_data,
    agree_on_launch,
    agree_on_start,
    manifest_digest,
    refuse_start,
)
from lumina.train.agreement.step_sums import StepSums, entry, pack, send, unpack
from lumina.train.agreement.store import (
    LostRankError,
    assert_lock_held,
    decided_by_rank_0,
    exchange,
    gathered,
    heartbeats,
    together,
)

__all__ = [
    "LostRankError",
    "StepSums",
    "agree_on_contents",
    "agree_on_data",
    "agree_on_launch",
    "agree_on_start",
    "assert_lock_held",
    "decided_by_rank_0",
    "entry",
    "exchange",
    "gathered",
    "heartbeats",
    "manifest_digest",
    "pack",
    "refuse_start",
    "send",
    "together",
    "unpack",
]
