"""The exit code of a run comes from the kind of its end, whatever the words that go with it."""

from __future__ import annotations

import pytest

from lumina.cluster import EXIT_RESIZE, EXIT_STOPPED
from lumina.train.outcomes import Stop, StopKind

CODES = {StopKind.SIGNAL: EXIT_STOPPED, StopKind.RESIZE: EXIT_RESIZE}


@pytest.mark.parametrize("kind", StopKind)
@pytest.mark.parametrize("reason", ["", "signal SIGTERM", "resize"])
def test_exit_codes(kind: StopKind, reason: str) -> None:
    assert Stop(kind, reason).exit_code == CODES.get(kind, 0)


def test_what_counts_as_finished() -> None:
    assert [kind for kind in StopKind if Stop(kind).finished] == [StopKind.FINISHED, StopKind.EARLY_STOPPING]
