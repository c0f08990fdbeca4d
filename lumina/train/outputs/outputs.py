"""Outputs of a run: console, metrics.jsonl, train.log, trackers, profile and sample answers, on rank 0.

`Outputs` is what the loop calls, and what it does is nothing: the other ranks have one of these. `RunOutputs` is rank
0's. Neither takes part in a collective.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from lumina.config import Config
from lumina.data import StepData
from lumina.model import ExpertBalance
from lumina.monitor import Console, EventLog, MetricsFile, Recorder, StepRecord, figures_text, perplexity
from lumina.train.deepspeed import APART, PHASES
from lumina.train.health import Health, LayerFigures, LayerObservation, MachineWatch, StepObservation
from lumina.train.liveness.stragglers import Comparison
from lumina.train.outputs.ending import summary
from lumina.train.outputs.profiling import Profile
from lumina.train.outputs.throughput import Utilisation
from lumina.train.recovery.spikes import Anomaly

log = logging.getLogger("lumina")
# What the console shows is kept in the run's log too, without being printed a second time.
record_log = logging.getLogger("lumina.record")
record_log.propagate = False
record_log.setLevel(logging.INFO)


@dataclass(frozen=True)
class StepFigures:
    """What is known of a step once its numbers have been read. loss: mean over the step's supervised tokens, in nats;
    NaN without one;
    applied: whether the update was made; seconds: by phase (lumina.train.deepspeed.timing); samples:
    lumina.data.loading.order.samples_id; ended: seconds since 1970; loss_scale: fp16's, None elsewhere;
    of_objective: means of the objective's figures by name; experts: how evenly the tokens went to them, if any;
    exchanged_bytes: that left this rank for those that it shares rows with, if any; flops: of what a rank computed, the
    mean of all ranks; memory: bytes in use on the rank that has the most, of memory_total: ranks that share rows have
    different work."""

    data: StepData
    loss: float
    lr: float
    grad_norm: float
    applied: bool
    anomaly: Anomaly | None
    seconds: dict[str, float]
    samples: str
    ended: float
    loss_scale: float | None
    of_objective: Mapping[str, float]
    experts: ExpertBalance | None = None
    exchanged_bytes: int | None = None
    flops: float = 0.0
    memory: int = 0
    memory_total: int = 0


class Outputs:
    """Shows and writes nothing. A context manager: left when the run ends, also by an exception."""

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None: ...

    def say(self, text: str) -> None:
        """A line on the console and in train.log."""

    def step(self, figures: StepFigures) -> None: ...

    def evaluation(
        self,
        step: int,
        loss: float,
        seconds: float,
        figures: Mapping[str, float],
        by_position: Sequence[Mapping[str, float]],
    ) -> None:
        """`figures`: the objective's, by name; by_position: as in lumina.train.evaluate.Evaluation."""

    def samples(self, step: int, answers: Sequence[tuple[str, str]]) -> None:
        """(prompt, answer) pairs of an evaluation."""

    def layers(self, step: int, figures: Mapping[str, LayerFigures]) -> None: ...

    def ranks(self, step: int, comparison: Comparison) -> None: ...

    def callback_values(self, step: int, values: Mapping[str, float]) -> None:
        """What callbacks logged at a step."""

    def profile_step(self) -> None:
        """A step is over: the profiler goes on to the next."""

    def rewind(self, step: int) -> None:
        """The run goes back to `step`: later steps will be recorded again."""

    def progress(self, what: str, done: int, total: int) -> None:
        """How far something is that takes long, such as an evaluation."""

    def summary(self, step: int, best: tuple[float, int] | None) -> None:
        """What a finished run came to; `best`: evaluation loss and its step."""

    def end(self, state: str, step: int, reason: str) -> None:
        """How the run ends: `state` is finished, stopped or failed."""


class RunOutputs(Outputs):
    """Rank 0's. Opened when the run's folder is there."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        events: EventLog,
        health: Health,
        machine: MachineWatch,
        *,
        fingerprint: str,
        steps_per_epoch: int,
        device: torch.device,
        may_write: Callable[[], bool] = lambda: True,
        **facts: int | str,
    ) -> None:
        """`config`: resolved; `fingerprint`: of the training data; `facts`: this start's entry of run.json, among them
        step, total_steps, world, precision and zero_stage. `machine` is closed with the outputs; `device`: whose
        memory is shown. `may_write`: false once another start of the run owns its folder: nothing is written there
        any more."""
        self._health, self._machine, self._steps_per_epoch = health, machine, steps_per_epoch
        step, total, precision = int(facts["step"]), int(facts["total_steps"]), str(facts["precision"])
        title = (
            f"{config.experiment_name} · {facts['world']} process(es), ZeRO-{facts['zero_stage']}, {facts['precision']}"
        )
        self._device = device
        self._console = Console(True, total, step, title, config.live_view)
        self._metrics = MetricsFile(folder / "metrics.jsonl", step, may_write)
        self._handler = logging.FileHandler(folder / "train.log")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._handler.addFilter(lambda record: may_write())
        for logger in (log, record_log):
            logger.addHandler(self._handler)
        self._utilisation = Utilisation(precision, torch.cuda.is_available())
        self._profile = Profile(folder, step, may_write) if config.profile else None
        self._recorder = Recorder(folder, config, self._metrics, fingerprint, may_write, **facts)
        self._ended = ("stopped", step, "")
        self._folder, self._first_step, self._began, self._tokens = folder, step, time.monotonic(), 0
        events.listeners += [self._recorder.event, self._console.event]
        self._console.replay(folder / "metrics.jsonl")

    def __enter__(self) -> RunOutputs:
        self._console.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._console.__exit__(kind, error, None)
        self._machine.close()
        if self._profile is not None:
            self._profile.close()
        self._recorder.close(*self._ended)
        self._metrics.close()
        for logger in (log, record_log):
            logger.removeHandler(self._handler)
        self._handler.close()

    def say(self, text: str) -> None:
        self._console.say(text)
        record_log.info(text)

    def step(self, figures: StepFigures) -> None:
        """The speed counts all of a step's time but what saving and evaluating took."""
        data, split = figures.data, figures.seconds
        self._tokens += data.tokens
        if (machine := self._machine.latest()) is not None:
            self._health.machine(machine)
        seconds = sum(split.get(phase, 0.0) for phase in PHASES if phase not in APART)
        seen = StepObservation(
            data.step + 1,
            figures.loss,
            figures.grad_norm,
            figures.applied,
            data.tokens / seconds,
            split["data"],
            seconds,
            figures.memory,
            figures.anomaly,
            loss_scale=figures.loss_scale,
            supervised_shares=tuple(data.shares.tolist()),
        )
        record = StepRecord(
            step=data.step + 1,
            epoch=data.epoch + 1,
            batch=data.batch_in_epoch + 1,
            batches=self._steps_per_epoch,
            loss=figures.loss,
            lr=figures.lr,
            grad_norm=figures.grad_norm,
            tokens=data.tokens,
            supervised_tokens=int(data.supervised_tokens),
            tokens_per_s=data.tokens / seconds,
            memory=figures.memory,
            memory_total=figures.memory_total,
            memory_kind="GPU" if self._device.type == "cuda" else "Mem",
            health=self._health.step(seen),
            time=figures.ended,
            applied=figures.applied,
            samples=figures.samples,
            supervised_tokens_per_s=data.supervised_tokens / seconds,
            seconds={name: round(value, 6) for name, value in split.items()},
            mfu=self._utilisation.of(figures.flops, seconds),
            of_objective=dict(figures.of_objective),
            experts=None if figures.experts is None else asdict(figures.experts),
            exchanged_bytes=figures.exchanged_bytes,
        )
        self._metrics.step(record)
        self._console.step(record)

    def evaluation(
        self,
        step: int,
        loss: float,
        seconds: float,
        figures: Mapping[str, float],
        by_position: Sequence[Mapping[str, float]],
    ) -> None:
        ppl = perplexity(loss)
        self._metrics.evaluation(step, loss, ppl, seconds, figures, by_position)
        self._console.evaluation(step, loss)
        self._health.evaluation(step, loss)
        more = figures_text(figures) if figures else f"PPL: {ppl:.2f}"
        self.say(f"Eval at step {step} | Loss: {loss:.6f} | {more} | {seconds:.1f}s")

    def samples(self, step: int, answers: Sequence[tuple[str, str]]) -> None:
        self._recorder.samples(step, answers)

    def layers(self, step: int, figures: Mapping[str, LayerFigures]) -> None:
        self._metrics.write("layers", step, {"layers": {name: asdict(value) for name, value in figures.items()}})
        self._health.layers(LayerObservation(step, dict(figures)))

    def ranks(self, step: int, comparison: Comparison) -> None:
        self._metrics.write("ranks", step, comparison.record())
        for text in comparison.slow():
            self._health.report("straggler", "warn", text)

    def callback_values(self, step: int, values: Mapping[str, float]) -> None:
        self._metrics.write("callback", step, dict(values))

    def profile_step(self) -> None:
        if self._profile is not None:
            self._profile.step()

    def rewind(self, step: int) -> None:
        self._metrics.rewind(step)
        self._recorder.rewind(step)

    def progress(self, what: str, done: int, total: int) -> None:
        self._console.progress(what, done, total)

    def summary(self, step: int, best: tuple[float, int] | None) -> None:
        seconds = time.monotonic() - self._began
        for text in summary(self._folder, step, best, seconds, step - self._first_step, self._tokens):
            self.say(text)

    def end(self, state: str, step: int, reason: str) -> None:
        self._ended = state, step, reason


def used_memory(device: torch.device) -> tuple[int, int]:
    """(bytes used, bytes there are): a GPU's most, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(device).total_memory
    return psutil.Process().memory_info().rss, psutil.virtual_memory().total
