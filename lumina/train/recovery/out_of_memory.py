"""Out of memory on some rank: whether all ranks can halve the micro-batch together, or this start must end.

They can where none has begun a collective of the step that the others will wait for. Ranks tell each other so without a
collective, since some may sit in one: through the process group's key-value store.
"""

from __future__ import annotations

import time
from contextlib import suppress

from lumina.train.agreement import exchange
from lumina.train.deepspeed import Ranks
from lumina.train.torch_private import default_store

_MANY = 64  # ranks


class StepReports:
    """How each rank came through the micro-batches of a step. `seconds`: how long others are waited for."""

    def __init__(self, ranks: Ranks, enabled: bool, seconds: float) -> None:
        """`enabled`: not where the forward pass is full of collectives. Ranks do not report among many either, for whom
        that is a store operation of every rank at every step: there memory that runs out ends the start, and the next
        one takes half."""
        self._ranks, self._seconds = ranks, seconds
        self._reporting = enabled and 1 < ranks.world <= _MANY

    def report(self, step: int, batch_size: int, state: str) -> None:
        """Let the other ranks know how this one came through the micro-batches, of `batch_size` samples, of `step`
        (from 1): "done", or out of memory "clean" (no collective begun) or "dirty". A step that is taken again with
        smaller micro-batches is another try, of which what was said of the first one says nothing."""
        if self._reporting:
            with suppress(RuntimeError):  # the store is gone with rank 0: the next collective says so
                default_store().set(self._key(self._ranks.rank), f"{step}/{batch_size}:{state}")

    def _key(self, rank: int) -> str:
        return f"lumina/step/{self._ranks.start}/{rank}"

    def all_clean(self, step: int, batch_size: int, clean: bool) -> bool:
        """After this rank ran out of memory in `step`: wait until every rank has reported. Returns whether all ran out
        with no collective begun. One that came through has reduced its gradients with the others, or waits for them.
        `clean`: this rank has begun no collective."""
        if self._ranks.world == 1:
            return True
        if not self._reporting:
            return False
        self.report(step, batch_size, "clean" if clean else "dirty")
        return all(self._state_of(rank, f"{step}/{batch_size}") == "clean" for rank in range(self._ranks.world))

    def _state_of(self, rank: int, attempt: str) -> str:
        """What `rank` reported of `attempt`; "silent" when nothing comes in time, because it sits in a collective;
        "gone" when rank 0, which holds the store, has given up before this rank could ask."""
        key, deadline = self._key(rank), time.monotonic() + self._seconds
        while time.monotonic() < deadline:
            try:
                told = default_store().get(key).decode() if default_store().check([key]) else None
            except RuntimeError:
                return "gone"
            if told is not None:
                at, state = told.split(":")
                if at == attempt:
                    return str(state)
            time.sleep(0.02)
        return "silent"

    def all_stopped_alike(self, step: int, batch_size: int, begun: bool, collectives: int) -> bool:
        """After this rank ran out of memory inside the update of `step`: whether every rank did, at the same place and
        before anything was changed. `begun`: weights or moments may have changed here; `collectives`: how many this
        rank has begun so far. The key is of this try of the step alone."""
        own = "begun" if begun else f"clean {collectives}"
        key = f"lumina/update/{step}/{batch_size}"
        found = exchange(key, {"state": own}, self._ranks, self._seconds)
        return found is not None and own != "begun" and all(one["state"] == own for one in found)
