"""Learning-rate schedules, one file each, found through lumina.config.registry.SCHEDULES.

A schedule is a function of the optimizer's configuration and the run's number of steps; what it returns is a pure
function of the step, so that resuming needs no scheduler state. Another package adds one by an entry point:

    [project.entry-points."lumina.schedules"]
    staircase = "my_package.staircase:SCHEDULE"

    def SCHEDULE(config: OptimConfig, total_steps: int) -> Schedule: ...
"""

from __future__ import annotations

from collections.abc import Callable

from lumina.config import SCHEDULES, OptimConfig

Schedule = Callable[[int], float]


def schedule(config: OptimConfig, total_steps: int) -> Schedule:
    """Learning rate of optimizer step k, for k in [0, total_steps), by `lr_scheduler`. Raises UserError where another
    package's schedule does not load."""
    made: Schedule = SCHEDULES.get(config.lr_scheduler)(config, total_steps)
    return made
