"""What recovery decides, as values: go back, halve the micro-batch, or fail; each bounded, and remembered."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lumina.config import UserError
from lumina.monitor import EventLog, read_events
from lumina.train.deepspeed import Ranks, init_process_group
from lumina.train.health import Health
from lumina.train.outcomes import Fail, HalveMicroBatch, Rewind
from lumina.train.recovery.last_word import RestartError
from lumina.train.recovery.record import RecoveryRecord
from lumina.train.recovery.recovery import Recovery
from lumina.train.recovery.spikes import SpikeDetector
from tests.train.tiny_engines import make_config


@pytest.fixture(autouse=True, scope="module")
def group() -> None:
    """The process group of this process alone, which all test files in it share: DeepSpeed keeps hold of the first."""
    init_process_group()


def make(
    folder: Path,
    rollbacks: int = 0,
    begun: bool = False,
    may_write: Callable[[], bool] = lambda: True,
    **settings: Any,
) -> Recovery:
    values = {"batch_size": 4, "global_batch_size": 8, "health_warmup": 4, "health_window": 16, **settings}
    config = make_config(**values)
    events = EventLog(folder / "events.jsonl")
    engine = SimpleNamespace(
        stage=2, collective_forward=False, fp16=False, begun=begun, timer=SimpleNamespace(collectives=3)
    )
    state: Any = SimpleNamespace(engine=engine, step=9, spikes=SpikeDetector(config), consistent=False)
    record = RecoveryRecord(rollbacks=rollbacks)
    health, room = Health(config, events), {"zero_ranks": 1.0}
    return Recovery(config, Ranks(0, 1, 0, 1), folder, record, state, events, health, may_write, room)


def refuse(recovery: Recovery, *steps: int) -> None:
    for step in steps:
        data: Any = SimpleNamespace(step=step - 1, samples=[step], supervised_tokens=9.0)
        recovery.after_update(data, 99.0, 1.0, False, None)


def told(folder: Path) -> list[tuple[int, str, str]]:
    return [(event["step"], event["level"], event["rule"]) for event in read_events(folder / "events.jsonl")]


def test_the_limit_is_one_that_no_norm_keeps_when_the_loss_is_anomalous(tmp_path: Path) -> None:
    recovery = make(tmp_path)
    data: Any = SimpleNamespace(step=9, supervised_tokens=9.0, samples=[1, 2])
    for step in range(1, 9):
        recovery.after_update(data, 2.0 + step / 100, 1.0, True, None)
    losses = [torch.tensor(loss, dtype=torch.float64) for loss in (2.0, 50.0, math.nan)]
    counts = [torch.tensor(count, dtype=torch.float64) for count in (0.0, 1.0, 2.0)]
    limits = [float(recovery.norm_limit(data, loss, counts[0])) for loss in losses]
    assert limits[0] > 1.0
    assert limits[1:] == [-1.0, -1.0]
    # A step of which no sample could be read has nothing to learn from.
    limits = [float(recovery.norm_limit(data, losses[0], count)) for count in counts]
    assert limits[1] > 1.0
    assert limits[2] == -1.0


def test_a_step_in_which_nothing_is_supervised_is_no_update_and_no_trouble(tmp_path: Path) -> None:
    recovery = make(tmp_path, rollback_after=1)
    data: Any = SimpleNamespace(step=9, supervised_tokens=0.0, samples=[1, 2])
    zero = torch.zeros((), dtype=torch.float64)
    assert float(recovery.norm_limit(data, zero, zero)) == -1.0
    recovery.after_update(data, math.nan, 0.0, False, None)
    assert not recovery.rewinding
    assert told(tmp_path) == []


def test_one_refused_step_is_no_reason_to_go_back(tmp_path: Path) -> None:
    recovery = make(tmp_path, rollback_after=3)
    refuse(recovery, 8, 9)
    assert not recovery.rewinding
    assert recovery.action(drain=pytest.fail) is None


def test_repeated_ones_without_a_checkpoint_are_forgotten(tmp_path: Path) -> None:
    recovery, drained = make(tmp_path, rollback_after=3), []
    refuse(recovery, 7, 8, 9)
    assert recovery.rewinding
    assert recovery.action(drain=lambda: drained.append(1)) is None
    assert drained == [1], "what is being written may be what there is to go back to"
    assert told(tmp_path)[-1] == (9, "warn", "rollback")
    refuse(recovery, 10, 11)
    assert not recovery.rewinding, "the count begins anew"


@pytest.mark.parametrize(
    ("steps", "norm", "clip", "anew"),
    [
        ((12, 13, 14), 60.0, 1.0, True),
        ((10, 12, 14), 60.0, 1.0, False),  # single steps among good ones: their samples
        ((12, 13, 14), math.inf, 1.0, False),  # no limit lets it through
        ((12, 13, 14), 60.0, 0.0, False),  # nothing would bound the update
    ],
)
def test_weights_beyond_every_limit_are_not_refused_for_ever(
    steps: tuple[int, ...], norm: float, clip: float, anew: bool, tmp_path: Path
) -> None:
    """Refused updates leave the weights as they are: without a checkpoint to go back to, every later step would be
    refused by the same limits."""
    recovery = make(tmp_path, rollback_after=3, max_rollbacks=2, max_grad_norm=clip)
    data: Any = SimpleNamespace(step=0, supervised_tokens=9.0, samples=[1])
    loss, none = torch.tensor(6.0, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for data.step in range(9):
        recovery.after_update(data, 6.0, 2.0 + data.step / 100, True, None)
    assert float(recovery.norm_limit(data, loss, none)) < 60.0
    for data.step in range(9, 14):
        refused = data.step + 1 in steps
        recovery.after_update(data, 6.0, norm if refused else 2.0, not refused, None)
    assert recovery.rewinding
    assert recovery.action(drain=lambda: None) is None
    assert (float(recovery.norm_limit(data, loss, none)) == math.inf) == anew
    assert ("measured anew" in list(read_events(tmp_path / "events.jsonl"))[-1]["action"]) == anew


def test_a_run_of_which_every_step_is_refused_ends(tmp_path: Path) -> None:
    recovery = make(tmp_path, rollback_after=3, max_rollbacks=2)
    data: Any = SimpleNamespace(step=0, supervised_tokens=9.0, samples=[1])
    actions = []
    for data.step in range(9):
        recovery.after_update(data, math.nan, 1.0, False, None)
        actions.append(recovery.action(drain=lambda: None) if recovery.rewinding else None)
    assert actions[:8] == [None] * 8
    assert isinstance(actions[8], Fail)
    assert json.loads((tmp_path / "recovery.json").read_text())["rollbacks"] == 2


def test_the_rollbacks_are_bounded(tmp_path: Path) -> None:
    recovery = make(tmp_path, rollback_after=3, rollbacks=2, max_rollbacks=2)
    refuse(recovery, 7, 8, 9)
    action = recovery.action(drain=pytest.fail)
    assert isinstance(action, Fail)
    assert isinstance(action.error, UserError)
    assert "after 2 rollbacks" in str(action.error)


def test_none_allowed_is_none_taken(tmp_path: Path) -> None:
    """A spike, or several in a row, end no run: it would be unsaved, and a resumed one would meet the same samples."""
    for settings in ({"rollback_after": 3}, {"rollback_after": 1}, {"rollback_after": 0, "health_check_interval": 1}):
        recovery = make(tmp_path, max_rollbacks=0, **settings)
        refuse(recovery, 5, 6, 7, 9)
        assert not recovery.rewinding
        assert recovery.action(drain=pytest.fail) is None


@pytest.mark.parametrize("settings", [{"rollback_after": 3, "max_rollbacks": 0}, {"rollback_after": 0}], ids=str)
@pytest.mark.parametrize(("interval", "most"), [(40, 40), (1, 30)])
def test_no_run_skips_for_ever(settings: dict[str, Any], interval: int, most: int, tmp_path: Path) -> None:
    """Also where going back is off: weights beyond the limits refuse every step to come, to a well-meant exit 0. A
    step in which nothing is supervised, or that is skipped by the record, is no update that was made."""
    recovery, actions = make(tmp_path, health_check_interval=interval, **settings), []
    unsupervised: Any = SimpleNamespace(step=0, samples=[1], supervised_tokens=0.0)
    good: Any = SimpleNamespace(step=0, samples=[1], supervised_tokens=9.0)
    refuse(recovery, *range(1, most))
    recovery.after_update(good, 2.0, 1.0, True, None)  # the count begins anew
    for step in range(most + 1, 3 * most):
        if step % 7 == 0:
            continue
        recovery.after_update(unsupervised, math.nan, 0.0, False, None)
        refuse(recovery, step)
        actions.append(recovery.action(drain=pytest.fail))
        if actions[-1] is not None:
            break
    assert len(actions) == most
    assert isinstance(actions[-1], Fail)
    assert "may not go back" in str(actions[-1].error)


def test_a_start_that_lost_the_run_leaves_its_record_alone(tmp_path: Path) -> None:
    recovery = make(tmp_path)
    recovery.remember_rewind(Rewind(tmp_path, [7], "many"))
    before = (tmp_path / "recovery.json").read_bytes()
    lost = make(tmp_path, may_write=lambda: False)
    lost.remember_rewind(Rewind(tmp_path, [8], "many"))
    lost.remember_micro_batch(2)
    assert (tmp_path / "recovery.json").read_bytes() == before


def test_skipped_steps_are_remembered_before_the_run_goes_back(tmp_path: Path) -> None:
    recovery = make(tmp_path)
    recovery.remember_rewind(Rewind(tmp_path, [7, 9], "many"))
    assert json.loads((tmp_path / "recovery.json").read_text())["skipped_steps"] == [7, 9]
    assert [recovery.skips(SimpleNamespace(step=step - 1)) for step in (7, 8, 9)] == [True, False, True]  # type: ignore[arg-type]


def test_memory_halves_the_micro_batch_down_to_one_sample(tmp_path: Path) -> None:
    recovery = make(tmp_path)
    sizes = []
    while isinstance(
        action := recovery.out_of_memory_in_micro_batches(5, [1, 2], "no memory", clean=True), HalveMicroBatch
    ):
        assert (action.step, action.failure, action.then) == (5, "no memory", None)
        recovery.remember_micro_batch(action.batch_size)
        assert RecoveryRecord.read(tmp_path).largest_micro_batch({}) == action.batch_size
        recovery.halved(action)
        sizes.append(action.batch_size)
    assert sizes == [2, 1]
    assert isinstance(action, Fail)
    assert "micro-batch of one sample" in str(action.error)


@pytest.mark.parametrize("agent", [False, True])
def test_an_update_that_was_begun_ends_the_start(agent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one takes half: by itself under an agent, which a UserError would end."""
    if agent:
        monkeypatch.setenv("LUMINA_AGENT", "1")
    else:
        monkeypatch.delenv("LUMINA_AGENT", raising=False)
    recovery = make(tmp_path, begun=True)
    action = recovery.out_of_memory_in_update(5, [1], "no memory")
    assert isinstance(action, Fail)
    assert isinstance(action.error, RestartError if agent else UserError)
    record = RecoveryRecord.read(tmp_path)
    assert (record.largest_micro_batch({"zero_ranks": 1.0}), record.global_batch_size) == (2, 8)
    assert record.largest_micro_batch({"zero_ranks": 2.0}) is None


def test_an_update_that_nobody_began_is_taken_again(tmp_path: Path) -> None:
    recovery = make(tmp_path)
    action = recovery.out_of_memory_in_update(5, [1], "no memory")
    assert isinstance(action, HalveMicroBatch)
    assert action.batch_size == 2
