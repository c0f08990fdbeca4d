"""Watching an engine's passes: what makes a long one of them no hang, in a step and before the first one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lumina.train.deepspeed import Engine, set_collective_timeout
from lumina.train.liveness.watchdog import Watchdog


def watch_passes(watchdog: Watchdog, engine: Engine) -> None:
    """From now on the engine's layers are progress, and no collective ends by a timeout of its own where the watchdog
    ends a hang. It has been entered."""
    if watchdog.watching:
        watchdog.progress.follow(engine)
    set_collective_timeout(watched=watchdog.ends_hangs)


def beat_between_passes(watchdog: Watchdog, engine: Engine, what: str) -> None:
    """The watchdog's heartbeat between passes before the training. What the timer has measured of them is no step's,
    and is let go of: on a GPU it is an event at each collective, of a whole data set's passes."""
    watchdog.heartbeat(what)
    engine.timer.lap()


@contextmanager
def watched_evaluation(watchdog: Watchdog, engine: Engine) -> Iterator[None]:
    """`engine.evaluation()` before the training, watched as a step is: a pass over rows of millions of tokens takes
    longer than a collective may."""
    with watchdog:
        watch_passes(watchdog, engine)
        try:
            with engine.evaluation():
                yield
        finally:
            set_collective_timeout()
