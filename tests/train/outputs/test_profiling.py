"""--profile: what it leaves in the run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumina.train.outputs.profiling import Profile


@pytest.mark.long  # torch's profiler takes four seconds of a processor to begin and to end
@pytest.mark.parametrize("owner", [True, False])
def test_a_start_that_lost_its_run_writes_no_profile(owner: bool, tmp_path: Path) -> None:
    """The start that owns the run takes the same steps, and may be writing theirs."""
    profile = Profile(tmp_path, 4, lambda: owner)
    for _ in range(6):
        profile.step()
    profile.close()
    names = ["profile", "profile/step-00000010.trace.json.gz", "profile/step-00000010.txt"]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == (names if owner else [])
