"""The loop and its steps, in runs of a few steps of a tiny model in this process: the order of things, what ends a run,
and that whatever happens on the way the weights at the end are those of the run that nothing happened to (law 6)."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lumina import Callback, CallbackError, Config, Context, StepResult, load_config, train
from lumina.checkpoint import CheckpointReader, list_checkpoints, name_of
from lumina.checkpoint.lock import NAME as LOCK
from lumina.cluster import EXIT_STOPPED
from lumina.config import UserError
from lumina.files import write_json
from lumina.model import Transformer
from lumina.train import LostRankError, build
from lumina.train.deepspeed import Ranks
from lumina.train.deferred import Deferred
from lumina.train.loop import fit
from lumina.train.outcomes import Stop, StopKind
from lumina.train.outputs.outputs import Outputs
from lumina.train.recovery.last_word import LastWord, RestartError
from lumina.train.run import TrainedRun
from tests.small_tokenizer import VOCABULARY, write_tokenizer

STEPS = 6
SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "seq_length": 64}
SETTINGS = {"precision": "fp32", "batch_size": 2, "global_batch_size": 4, "max_steps": STEPS, "num_workers": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, in which runs share their prepared data."""
    folder = tmp_path_factory.mktemp("loop")
    write_tokenizer(folder / "tokenizer")
    return folder


Make = Callable[..., Config]


@pytest.fixture
def make(base: Path, conversations: Path, tmp_path: Path) -> Make:
    """Configurations of runs of this test: make(name, **changes)."""

    def make(name: str, **changes: Any) -> Config:
        files = {"tokenizer": str(base / "tokenizer"), "train_data": [str(conversations)], "output_dir": str(tmp_path)}
        own = {"vocab_size": VOCABULARY, "experiment_name": name, **files}
        return load_config("nano", **{**SHAPE, **SETTINGS, **own, **changes})

    return make


class Noting(Callback):
    """Notes each call, and does one thing where it is told to."""

    def __init__(self, at: str = "", what: Callable[[Context], None] = lambda context: None) -> None:
        self.calls: list[str] = []
        self.results: list[StepResult] = []
        self.losses: list[float] = []
        self.stop: Stop | None = None
        self._at, self._what = at, what

    def _note(self, call: str, context: Context) -> None:
        self.calls.append(call)
        if call == self._at:
            self._what(context)

    def at_start(self, context: Context) -> None:
        self._note(f"start {context.step}", context)

    def before_step(self, context: Context) -> None:
        self._note(f"before {context.step + 1}", context)

    def after_step(self, context: Context, result: StepResult) -> None:
        self.results.append(result)
        self._note(f"after {result.step}", context)

    def at_evaluation(self, context: Context, loss: float) -> None:
        self.losses.append(loss)
        self._note(f"evaluation {context.step}", context)

    def at_end(self, context: Context, stop: Stop) -> None:
        self.stop = stop
        self._note(f"end {context.step}", context)


def weights(run: TrainedRun, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Master weights and moments of the checkpoint of a step."""
    reader = CheckpointReader(run.folder / "checkpoints" / name_of(step))
    found = {}
    for name in reader.names():
        for key in ("master", *reader.keys):
            found[f"{key}/{name}"] = torch.empty(reader.numel(name))
            reader.read(key, name, 0, found[f"{key}/{name}"])
    return found


def same(a: TrainedRun, b: TrainedRun, step: int = STEPS) -> bool:
    ours, theirs = weights(a, step), weights(b, step)
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def events(run: TrainedRun) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]


def scheduled(step: int, peak: float, floor: float, warmup: int, steps: int) -> float:
    if step <= warmup:
        return peak * step / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - 1 - warmup) / (steps - 1 - warmup))) / 2


def test_the_order_of_a_run(make: Make, conversations: Path) -> None:
    """A step's figures are told in the next one, or at once where the run waits anyway; the rate is the step's own."""
    noting = Noting()
    settings = {"eval_data": [str(conversations)], "eval_every_n_batches": 3, "learning_rate": 1e-2, "min_lr": 1e-4}
    schedule = {"lr_scheduler": "cosine", "warmup_ratio": 2 / STEPS}
    asked = {"sample_prompts": ["hello there"], "sample_tokens": 3, "layer_stats_every": 4}
    run = train(make("run", **settings, **schedule, **asked), [noting])
    assert run.exit_code == 0
    assert noting.calls == [
        "start 0",
        "before 1",
        "before 2",
        "after 1",
        "before 3",
        "after 2",
        "after 3",
        "evaluation 3",
        "before 4",
        "before 5",
        "after 4",
        "before 6",
        "after 5",
        "after 6",
        "evaluation 6",
        "end 6",
    ]
    assert noting.stop == Stop(StopKind.FINISHED)
    rates = [scheduled(step, 1e-2, 1e-4, 2, STEPS) for step in range(1, STEPS + 1)]
    records = list(run.metrics())
    assert [record["lr"] for record in records] == pytest.approx(rates)
    for result, record in zip(noting.results, records, strict=True):
        assert (result.step, result.loss, result.learning_rate) == (record["step"], record["loss"], record["lr"])
        assert (result.gradient_norm, result.tokens) == (record["grad_norm"], record["tokens"])
        assert result.applied
        assert 0 < result.supervised_tokens < result.tokens
        assert (result.layers is not None) == (result.step == 4)
    assert [record["step"] for record in run.metrics("layers")] == [4]
    evaluations = list(run.metrics("eval"))
    assert [(record["step"], record["loss"]) for record in evaluations] == [
        (3, noting.losses[0]),
        (6, noting.losses[1]),
    ]
    assert noting.losses[1] < noting.losses[0] < math.log(VOCABULARY) * 1.1


def test_a_run_that_is_complete_trains_no_more(make: Make) -> None:
    first, again = train(make("run")), Noting()
    record = (first.folder / "metrics.jsonl").read_bytes()
    assert train(make("run", resume="auto"), [again]).exit_code == 0
    assert again.calls == [f"start {STEPS}", f"end {STEPS}"]
    assert again.stop == Stop(StopKind.FINISHED)
    assert len(list(first.metrics())) == STEPS
    assert (first.folder / "metrics.jsonl").read_bytes().startswith(record)


def test_a_start_that_lost_the_run_while_it_was_built_writes_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two starts at one moment: the later one has taken the lock of the first, whose settings may be others."""
    config, make_engine = make("run"), build.make_engine
    folder = Path(config.output_dir) / "run"

    def meanwhile(*given: Any, **named: Any) -> Any:
        write_json(folder / LOCK, {"token": "0a", "pid": 17, "host": "far", "since": 0})
        return make_engine(*given, **named)

    monkeypatch.setattr(build, "make_engine", meanwhile)
    with pytest.raises(UserError, match=r"process 17 on far, since .* owns the run .* writes nothing more"):
        train(config)
    assert [path.name for path in folder.iterdir()] == [LOCK]


def ask_to_stop(context: Context) -> None:
    context.stop("enough")


def terminate(context: Context) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("what", "kind", "code", "reason"),
    [
        (ask_to_stop, StopKind.CALLBACK, 0, "enough"),
        (terminate, StopKind.SIGNAL, EXIT_STOPPED, f"signal {signal.SIGTERM.name}"),
    ],
)
def test_stopped_and_resumed(
    what: Callable[[Context], None], kind: StopKind, code: int, reason: str, make: Make, capfd: Any
) -> None:
    """The step under way is not made; the checkpoint is the last whole step's, and the run goes on from it as if
    nothing had been."""
    noting = Noting("before 3", what)
    stopped = train(make("run"), [noting])
    assert stopped.exit_code == code
    assert noting.stop is not None
    assert (noting.stop.kind, noting.stop.error) == (kind, None)
    assert reason in noting.stop.reason
    step = int(noting.calls[-1].split()[1])
    assert step in (2, 3)
    assert [path.name for path in list_checkpoints(stopped.folder / "checkpoints")] == [name_of(step)]
    assert f"Stopped at step {step}: {noting.stop.reason}. The checkpoint is saved." in capfd.readouterr().out
    after = Noting()
    resumed = train(make("run", resume="auto"), [after])
    assert after.calls[:2] == [f"start {step}", f"before {step + 1}"]
    whole = train(make("whole"))
    assert same(resumed, whole)
    assert [r["loss"] for r in resumed.metrics()] == [r["loss"] for r in whole.metrics()]
    assert [r["samples"] for r in resumed.metrics()] == [r["samples"] for r in whole.metrics()]


def test_a_callback_that_fails_ends_the_run_after_a_save(make: Make) -> None:
    def fail(context: Context) -> None:
        raise LookupError("planted")

    noting = Noting("before 3", fail)
    with pytest.raises(CallbackError, match="planted"):
        train(make("run"), [noting])
    folder = Path(make("run").output_dir) / "run"
    assert len(list_checkpoints(folder / "checkpoints")) == 1
    assert not any(call.startswith("end") for call in noting.calls)


def test_early_stopping_by_its_patience(make: Make, conversations: Path) -> None:
    """At a rate that ruins the model."""
    noting = Noting()
    settings = {"eval_every_n_batches": 1, "early_stopping_patience": 2, "keep_last": 1}
    rate = {"learning_rate": 1.0, "lr_scheduler": "constant", "warmup_ratio": 0.0}
    run = train(make("run", eval_data=[str(conversations)], **rate, **settings), [noting])
    best = min(range(len(noting.losses)), key=noting.losses.__getitem__)
    assert len(noting.losses) == best + 3 < STEPS
    assert run.exit_code == 0
    expected = f"no better evaluation in 2 (best {noting.losses[best]:.4f} at step {best + 1})"
    assert noting.stop == Stop(StopKind.EARLY_STOPPING, expected)
    saved = [path.name for path in list_checkpoints(run.folder / "checkpoints")]
    assert saved == [name_of(best + 3), name_of(best + 1)]
    assert json.loads((run.folder / "checkpoints/best.json").read_text())["step"] == best + 1


@contextmanager
def out_of_memory_at(call: int) -> Iterator[None]:
    """The model's forward pass number `call` (from 1) runs out of memory."""
    count = 0

    def hook(module: torch.nn.Module, given: Any) -> None:
        nonlocal count
        if isinstance(module, Transformer):
            count += 1
            if count == call:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more.")

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_out_of_memory_halves_the_micro_batch_and_nothing_else(make: Make) -> None:
    """In the second micro-batch of the third step: it is taken again, with the same samples and the same loss."""
    noting = Noting()
    with out_of_memory_at(6):
        run = train(make("run"), [noting])
    assert run.exit_code == 0
    assert noting.calls.count("before 3") == 2
    assert [call for call in noting.calls if call.startswith("after")] == [f"after {n}" for n in range(1, STEPS + 1)]
    (event,) = [event for event in events(run) if event["rule"] == "out-of-memory"]
    assert event["step"] == 3
    assert event["reason"] == "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert len(event["samples"]) > 0
    whole = list(train(make("whole")).metrics())
    assert [r["samples"] for r in run.metrics()] == [r["samples"] for r in whole]
    assert [r["loss"] for r in run.metrics()] == pytest.approx([r["loss"] for r in whole], rel=1e-5)
    assert [r["grad_norm"] for r in run.metrics()] == pytest.approx([r["grad_norm"] for r in whole], rel=1e-4)


def test_out_of_memory_fails_where_it_is_to(make: Make) -> None:
    with out_of_memory_at(6), pytest.raises(torch.OutOfMemoryError):
        train(make("run", on_oom="fail"))
    folder = Path(make("run").output_dir) / "run"
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == [name_of(2)], "of the emergency"


@contextmanager
def loss_times(factor: float, calls: set[int]) -> Iterator[None]:
    """These forward passes of the model (from 1) give a loss `factor` times as large."""
    count = 0

    def hook(module: torch.nn.Module, given: Any, output: Any) -> Any:
        nonlocal count
        if not isinstance(module, Transformer):
            return None
        count += 1
        return output * factor if count in calls else None

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_spikes_take_the_run_back_and_their_steps_are_skipped(make: Make) -> None:
    """Steps 5 and 6 spike: the run goes back to the checkpoint of step 4 and makes no update for them."""
    noting = Noting()
    rules = {"health_warmup": 4, "rollback_after": 2, "save_every_n_batches": 4, "save_async": False}
    with loss_times(1e4, {9, 10, 11, 12}):
        run = train(make("run", max_steps=8, **rules), [noting])
    assert run.exit_code == 0
    assert "after 5" in noting.calls
    assert "after 6" not in noting.calls, "the run went back before it was told"
    rollbacks = [event for event in events(run) if event["rule"] == "rollback"]
    assert [event["action"] for event in rollbacks] == [
        "back to the checkpoint of step 4; steps 5, 6 are skipped",
        "skipped",
        "skipped",
    ]
    assert [event["step"] for event in rollbacks] == [6, 5, 6]
    assert [record["step"] for record in run.metrics()] == [1, 2, 3, 4, 7, 8]
    assert noting.calls[-3:] == ["after 7", "after 8", "end 8"]


# --- What an exception leads to, with parts that note what they are asked ---


class Watchdog:
    """Notes its heartbeats."""

    def __init__(self) -> None:
        self.beats: list[str] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, *given: object) -> None:
        pass

    def heartbeat(self, what: str) -> None:
        self.beats.append(what)


def failing(error: BaseException, ranks: Ranks, folder: Path) -> tuple[Any, list[tuple[Any, dict[str, bool]]]]:
    """A run that meets `error`, and the emergency checkpoints that it asks for."""
    emergencies: list[tuple[Any, dict[str, bool]]] = []

    def fail() -> None:
        raise error

    run = SimpleNamespace(
        outputs=Outputs(),
        watchdog=Watchdog(),
        deferred=Deferred(),
        state=SimpleNamespace(step=4),
        recovery=SimpleNamespace(rewinding=False, last_word=LastWord(ranks, folder)),
        callbacks=SimpleNamespace(at_start=fail),
        folder=folder / "run",
        ranks=ranks,
        usual_world=1,
        lock=None,
        saves=SimpleNamespace(
            last_begun=3, stop_waiting=lambda seconds: None, emergency=lambda why, **how: emergencies.append((why, how))
        ),
    )
    return run, emergencies


@pytest.mark.parametrize(
    ("error", "reported", "saved"),
    [
        (UserError("wrong", "put it right"), None, None),
        (KeyboardInterrupt(), None, None),
        (RestartError("half made"), "half made", None),
        (ValueError("odd"), "ValueError: odd", {"alone": False}),
        (RuntimeError("gloo/transport/tcp: gone"), "RuntimeError: gloo/transport/tcp: gone", {"alone": True}),
        (
            RuntimeError("read: Connection reset by peer"),
            "RuntimeError: read: Connection reset by peer",
            {"alone": True},
        ),
        (RuntimeError("Connection closed by peer"), "RuntimeError: Connection closed by peer", {"alone": True}),
        (RuntimeError("NCCL error"), "RuntimeError: NCCL error", {"alone": True}),
        (dist.DistBackendError("timed out"), "DistBackendError: timed out", {"alone": True}),
        (LostRankError("rank 1 is gone"), "LostRankError: rank 1 is gone", {"alone": True}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_an_exception_leads_to(
    error: BaseException,
    reported: str | None,
    saved: dict[str, bool] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The launcher is told the reason; an emergency checkpoint is asked for, but not where the user must do something
    first, or where the ranks are at different steps."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    run, emergencies = failing(error, Ranks(0, 1, 0, 1), tmp_path)
    with pytest.raises(type(error)) as raised:
        fit(run)
    assert raised.value is error
    if reported is None:
        assert not (tmp_path / "error.json").exists()
    else:
        message = json.loads((tmp_path / "error.json").read_text())["message"]
        assert message["message"] == reported
        assert ("raise error" in message["extraInfo"]["py_callstack"]) == (saved is not None)
    assert emergencies == ([] if saved is None else [(reported, {"rewinding": False, **saved})])
    assert run.watchdog.beats == ([] if saved is None else ["emergency checkpoint"])


@pytest.mark.parametrize(
    ("met", "lost"),
    [(OSError(errno.ESTALE, "Stale file handle", "data.arrow"), RestartError), (UserError("a"), UserError)],
)
def test_what_one_rank_cannot_read_is_no_users_mistake_of_the_others(
    met: Exception, lost: type[Exception], tmp_path: Path
) -> None:
    """A launcher starts no rank again after a user's mistake, and a disk or a network may come back."""
    ranks = [Ranks(rank, 2, rank, 2, "a") for rank in (0, 1)]
    with pytest.raises(type(met)):
        fit(failing(met, ranks[1], tmp_path)[0])
    with pytest.raises(lost) as raised:
        fit(failing(LostRankError("rank 1 is gone"), ranks[0], tmp_path)[0])
    assert ("Stale file handle" in str(raised.value)) == isinstance(met, OSError)
    assert isinstance(raised.value, UserError) == isinstance(met, UserError), "exit code 2"
