"""--measure: which steps count, and one real measured run of a very small model."""

import json
import os

import pytest

from lumina import cli
from lumina.config import UserError
from lumina.plan import measure
from lumina.plan.measure import WARM_UP, counted, summarise, usable_processes
from tests.runs.processes import clean_environment


def record(tokens: int, seconds: float, supervised: int = 50) -> dict[str, object]:
    step = {"kind": "step", "tokens": tokens, "tokens_per_s": tokens / seconds, "memory": 1e9}
    return step | {"supervised_tokens": supervised}


def test_warm_up_and_short_batches_do_not_count() -> None:
    slow = [record(100, 50.0)] * WARM_UP
    usual = [record(100, 1.0), record(100, 1.0), record(100, 2.0), record(100, 4.0)]
    short = [record(10, 0.1), {"kind": "eval", "loss": 1.0}]
    found = summarise(counted([*slow, *usual, *short]), processes=2, global_batch=8)
    assert (found.steps, found.seconds, found.spread) == (4, 2.0, 1.5)
    assert found.tokens_per_second == 50


def test_the_mean_is_moved_to_the_share_of_supervised_tokens_in_the_whole_data() -> None:
    """Steps of 1 s and 10 ms for each supervised token: at 80 of 100 tokens, 1.8 s."""
    steps = [record(100, 1 + 0.01 * count, count) for count in (10, 40, 20, 30)]
    assert summarise(steps, 1, 8, supervised=0.8).seconds == pytest.approx(1.8)
    assert summarise(steps, 1, 8).seconds == pytest.approx(1.25)


def test_noise_does_not_make_more_work_cheaper() -> None:
    steps = [record(100, 3.0, 10), record(100, 1.0, 30)]
    assert summarise(steps, 1, 8, supervised=0.9).seconds == 2.0
    assert summarise([record(100, 3.0, 10)] * 2, 1, 8, supervised=0.9).seconds == 3.0  # nothing to fit


def test_too_little_data_is_said() -> None:
    with pytest.raises(UserError, match="too small to measure"):
        counted([record(100, 1.0)] * WARM_UP)


def test_more_processes_than_cores_are_refused() -> None:
    with pytest.raises(UserError, match="4096 processes"):
        usable_processes(4096)


def test_this_machine_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate-time", "--config", "nano", "--measure", "--gpu", "h100"]) == 2
    assert cli.main(["estimate-time", "--config", "nano", "--measure", "--nodes", "2"]) == 2


@pytest.mark.long
def test_a_real_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(name)  # of a process group that another test made in this process
    monkeypatch.setattr(measure, "COUNTED", 2)
    monkeypatch.setattr(measure, "ENOUGH", 2.0)  # a step takes some 30 ms: a second run is needed
    tiny = ["hidden_size=32", "num_layers=1", "num_heads=2", "num_kv_heads=1", "seq_length=64"]
    sets = [word for pair in tiny for word in ("--set", pair)]
    argv = ["estimate-time", "--config", "nano", *sets, "--batch-size", "2", "--grad-accum", "1", "--measure", "--json"]
    assert cli.main([*argv, "--tokens", "6400", "--epochs", "1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    measured = answer["measured"]
    assert measured["global_batch"] == 2
    assert measured["steps"] > measure.COUNTED
    assert 64 < measured["tokens_per_step"] <= 128
    assert measured["run_steps"] == 50  # 6,400 tokens are 100 windows of 64, two a step
    assert measured["run_seconds"] == pytest.approx(50 * measured["seconds"])
