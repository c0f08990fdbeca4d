"""torch's elastic agent calls the methods that we override, under the names that it has for them."""

from __future__ import annotations

import inspect
import signal
from typing import Any

import pytest
from torch.distributed.elastic.agent.server import api
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState

from lumina.cluster.elastic.torch_agent import NAMES, RankAgent
from lumina.config.private_names import require


class Recording(RankAgent):
    """Without torch's own __init__, which wants a rendezvous: only the calls are looked at."""

    def __init__(self) -> None:
        self.called: list[tuple[Any, ...]] = []

    def look(self, worker_group: Any) -> RunResult:
        self.called.append(("look", worker_group))
        return RunResult(WorkerState.HEALTHY)

    def stop_ranks(self) -> None:
        self.called.append(("stop_ranks",))

    def end_ranks(self, number: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self.called.append(("end_ranks", number, timeout))

    def await_others(self) -> None:
        self.called.append(("await_others",))


def test_the_installed_torch_has_every_name() -> None:
    require("torch", NAMES)


@pytest.mark.parametrize(
    ("torchs", "given", "ours"),
    [
        ("_monitor_workers", ("group",), ("look", "group")),
        ("_stop_workers", ("group",), ("stop_ranks",)),
        ("_shutdown", (signal.SIGKILL, 3), ("end_ranks", signal.SIGKILL, 3)),
        ("_shutdown", (), ("end_ranks", signal.SIGTERM, 30)),
        ("_exit_barrier", (), ("await_others",)),
    ],
)
def test_a_call_of_torchs_is_ours(torchs: str, given: tuple[Any, ...], ours: tuple[Any, ...]) -> None:
    agent = Recording()
    getattr(agent, torchs)(*given)
    assert agent.called == [ours]
    assert f"self.{torchs}(" in inspect.getsource(api.SimpleElasticAgent), "torch calls it"
