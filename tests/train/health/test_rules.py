"""Every rule: a planted signal that it must raise, and one like it that it must not; and none over a clean run."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from lumina.config import HEALTH_RULES, Config
from lumina.monitor.events import EventLog
from lumina.train.health import (
    EvaluationObservation,
    GpuFigures,
    Health,
    LayerFigures,
    LayerObservation,
    MachineObservation,
    StepObservation,
)
from lumina.train.health import docs as health_docs
from lumina.train.recovery.spikes import GRAD_EXPLOSION, LOSS_SPIKE, SpikeDetector
from tests.train.tiny_engines import make_config

CONFIG = make_config()
GIB = 2**30


def noise(seed: int = 0) -> Callable[[float, float], float]:
    return random.Random(seed).gauss


def steps(count: int, **series: Callable[[int], Any]) -> list[StepObservation]:
    """`count` steps of an ordinary run (loss 2 and norm 1 with noise, 1000 tokens/s) but for the given series."""
    gauss = noise()
    usual: dict[str, Callable[[int], Any]] = {
        "loss": lambda n: 2.0 + gauss(0, 0.2),
        "grad_norm": lambda n: math.exp(gauss(0, 0.3)),
        "applied": lambda n: True,
        "tokens_per_s": lambda n: 1000 + gauss(0, 100),
        "wait": lambda n: 0.01,
        "seconds": lambda n: 1.0,
        "memory": lambda n: 4 * GIB + n,
    }
    made = usual | series
    return [StepObservation(step=n, **{key: make(n) for key, make in made.items()}) for n in range(1, count + 1)]


def layers(count: int, **changed: Callable[[int], LayerFigures]) -> list[LayerObservation]:
    gauss = noise()
    usual = lambda: LayerFigures(math.exp(gauss(0, 0.5)), 10.0, 0.01)
    names = [f"layers.{n}" for n in range(4)]
    found = []
    for n in range(count):
        special = {name.replace("_", "."): figures(n) for name, figures in changed.items()}
        found.append(LayerObservation(100 * n, {name: usual() for name in names} | special))
    return found


def gpus(count: int, **series: Callable[[int], Any]) -> list[MachineObservation]:
    usual: dict[str, Callable[[int], Any]] = {"temperature": lambda n: 70.0 + n % 10}
    return [
        MachineObservation(gpus=(GpuFigures(0, **{k: f(n) for k, f in (usual | series).items()}),))
        for n in range(count)
    ]


def disk(*free: int) -> list[MachineObservation]:
    return [MachineObservation(free={"checkpoints": value}, checkpoint_bytes=GIB) for value in free]


def evaluations(losses: Iterable[float], train: Iterable[float]) -> list[EvaluationObservation]:
    return [EvaluationObservation(100 * n, a, b) for n, (a, b) in enumerate(zip(losses, train, strict=True))]


def fp16(scale: Callable[[int], float]) -> list[StepObservation]:
    return [StepObservation(n, 2.0, 1.0, True, loss_scale=scale(n)) for n in range(40)]


FALLING = lambda n: 3.0 - 0.0002 * n + 0.1 * ((n * 7919) % 13 - 6) / 6
FLAT = lambda n: 3.0 + 0.1 * ((n * 7919) % 13 - 6) / 6
NAN_AT_50 = lambda n: math.nan if n == 50 else 2.0
DEAD = lambda n: LayerFigures(0.0, 10.0, 0.0)
DEAD_ONCE = lambda n: LayerFigures(0.0 if n == 5 else 1.0, 10.0, 0.01)
SMALL = lambda n: LayerFigures(1e-4, 10.0, 0.01)

# rule, what must raise it, what must not
PLANTED: list[tuple[str, list[Any], list[Any]]] = [
    ("loss-not-finite", steps(60, loss=NAN_AT_50), steps(60)),
    ("not-finite", steps(60, applied=lambda n: n != 50), steps(60)),
    ("skipped-in-a-row", steps(60, applied=lambda n: not 50 <= n < 53), steps(60, applied=lambda n: n % 3 != 0)),
    ("grad-vanishing", steps(90, grad_norm=lambda n: 1.0 if n < 60 else 1e-5),
     steps(90, grad_norm=lambda n: 0.9**n)),
    ("plateau", steps(9000, loss=FLAT), steps(9000, loss=FALLING)),
    ("loss-scale-collapse", fp16(lambda n: 65536 / 2**n), fp16(lambda n: 65536 / 2 ** (n % 8))),
    ("throughput-fall", steps(90, tokens_per_s=lambda n: 1000.0 if n < 60 else 400.0),
     steps(90, tokens_per_s=lambda n: 400.0 if n % 10 == 0 else 1000.0)),
    ("data-starvation", steps(90, wait=lambda n: 0.3), steps(90, wait=lambda n: 0.9 if n % 10 == 0 else 0.02)),
    ("little-supervision", steps(60, supervised_shares=lambda n: (0.3, 0.0 if n % 2 else 0.4)),
     steps(60, supervised_shares=lambda n: (0.3, 0.0 if n % 10 == 0 else 0.4))),
    ("memory-growth", steps(900, memory=lambda n: GIB + n * 2**20),
     steps(900, memory=lambda n: GIB * (1 + (n > 9)))),
    ("divergence", evaluations((3, 2.5, 2.6, 2.7, 2.8), (3, 2.4, 2.3, 2.2, 2.1)),
     evaluations((3, 2.5, 2.6, 2.5, 2.6), (3, 2.4, 2.3, 2.2, 2.1))),
    ("layer-dead", layers(10, layers_1=DEAD), layers(10, layers_1=DEAD_ONCE, layers_2=SMALL)),
    ("layer-exploding", layers(10, layers_3=lambda n: LayerFigures(1.0 if n < 8 else 400.0, 10.0, 0.01)),
     layers(50)),
    ("layer-exploding", layers(3, layers_3=lambda n: LayerFigures(1.0, 10.0, 6.0)), layers(3)),
    ("disk-full", disk(9 * GIB, 2 * GIB), disk(9 * GIB, 4 * GIB)),
    ("gpu-temperature", gpus(9, temperature=lambda n: 85.0 + n), gpus(9)),
    ("gpu-throttled", gpus(9, throttled=lambda n: "power brake" if n == 5 else ""), gpus(9)),
    ("gpu-ecc", gpus(9, ecc_errors=lambda n: 3 + (n > 5)), gpus(9, ecc_errors=lambda n: 3)),
]  # fmt: skip


def raised(name: str, seen: list[Any]) -> list[str]:
    rule = HEALTH_RULES.get(name)(CONFIG)
    return [reason for one in seen if (reason := rule.check(one)) is not None]


@pytest.mark.parametrize(("name", "planted", "clean"), PLANTED, ids=[name for name, *_ in PLANTED])
def test_raised_by_its_signal_only(name: str, planted: list[Any], clean: list[Any]) -> None:
    assert {type(one) for one in planted} == {HEALTH_RULES.get(name).observes}
    assert raised(name, planted)
    assert raised(name, clean) == []


def test_every_rule_has_a_planted_signal() -> None:
    by_detector = {LOSS_SPIKE, GRAD_EXPLOSION}  # below
    checked = {name for name in HEALTH_RULES.own() if HEALTH_RULES.get(name).observes is not None}
    assert {name for name, *_ in PLANTED} == checked - by_detector


def anomalies(config: Config, seen: Iterable[StepObservation]) -> list[tuple[int, str]]:
    """The steps that the spike detector refuses, as the loop asks it."""
    detector, refused = SpikeDetector(config), []
    for one in seen:
        anomaly = detector.classify(one.loss, one.grad_norm)
        if anomaly is None:
            detector.accept(one.loss, one.grad_norm)
        else:
            rule, reason = anomaly
            refused.append((one.step, rule))
            as_seen = StepObservation(one.step, one.loss, one.grad_norm, False, anomaly=(rule, reason))
            assert HEALTH_RULES.get(rule)(config).check(as_seen) == f"step {one.step}: {reason}"
            assert HEALTH_RULES.get("not-finite")(config).check(as_seen) is None
    return refused


def test_spikes_are_refused_and_stay_out_of_the_baseline() -> None:
    spiky = steps(200, loss=lambda n: 40.0 if n >= 150 and n % 2 else 2.0 + 0.01 * (n % 7))
    assert anomalies(CONFIG, spiky) == [(n, LOSS_SPIKE) for n in range(151, 200, 2)]
    burst = steps(200, grad_norm=lambda n: 30.0 if n == 180 else 1.0 + 0.1 * (n % 5))
    assert anomalies(CONFIG, burst) == [(180, GRAD_EXPLOSION)]


def test_no_spike_before_the_baseline_is_known() -> None:
    assert anomalies(CONFIG, steps(31, loss=lambda n: 10.0**n, grad_norm=lambda n: 10.0**n)) == []


def test_noise_and_a_falling_loss_are_no_spikes() -> None:
    assert anomalies(CONFIG, steps(3000)) == []
    falling = steps(3000, loss=lambda n: 2 + 9 * math.exp(-n / 300), grad_norm=lambda n: 1 + 20 * math.exp(-n / 50))
    assert anomalies(CONFIG, falling) == []


def test_samples_that_are_not_learned_by_heart_are_no_spikes_beside_those_that_are() -> None:
    """As in the quickstart: most steps are of memorised exchanges, one in ten holds other text, whose loss varies."""
    two = steps(
        400,
        loss=lambda n: 0.1 + 0.02 * (n % 7) if n % 10 else 2.6 + 0.4 * (n // 10 % 3),
        grad_norm=lambda n: 0.1 + 0.01 * (n % 7) if n % 10 else 1.5 + 0.4 * (n // 10 % 3),
    )
    assert anomalies(CONFIG, two) == []
    beyond = steps(400, loss=lambda n: 9.0 if n == 390 else two[n - 1].loss, grad_norm=lambda n: two[n - 1].grad_norm)
    assert anomalies(CONFIG, beyond) == [(390, LOSS_SPIKE)]


def test_a_spike_detector_goes_on_from_its_state() -> None:
    seen = steps(300, loss=lambda n: 2.0 + 0.01 * (n * 37 % 11), grad_norm=lambda n: 1 + (n * 31 % 7) / 7)
    detector = SpikeDetector(CONFIG)
    for one in seen:
        detector.accept(one.loss, one.grad_norm)
    detector.refuse(290)
    other = SpikeDetector(CONFIG, json.loads(json.dumps(detector.state())))
    assert other.refused_in_a_row == 1
    assert other.norm_limit() == detector.norm_limit()
    assert other.classify(9.0, 1.0) == detector.classify(9.0, 1.0) is not None
    assert other.refuse(300) == [290, 300]
    assert other.refuse(395) == [300, 395]


# A tiny run of 2,000 steps with evaluations, recorded by tests/train/health/record_clean_run.py.
RECORDED = Path(__file__).with_name("clean_run.jsonl.gz")


def recorded() -> list[dict[str, Any]]:
    with gzip.open(RECORDED, "rt") as file:
        return [json.loads(line) for line in file]


def test_silent_over_a_clean_recorded_run() -> None:
    found = recorded()
    of_steps = [record for record in found if record["kind"] == "step"]
    assert len(of_steps) == 2000
    detector, health = SpikeDetector(CONFIG), Health(CONFIG, EventLog(None))
    for record in found:
        if record["kind"] == "step":
            norm, loss = record["grad_norm"], record["loss"]
            assert detector.classify(loss, norm) is None, record
            detector.accept(loss, norm)
            speed = {key: record[key] for key in ("tokens_per_s", "wait", "seconds", "memory")}
            seen = StepObservation(record["step"], loss, norm, True, **speed)
            assert health.step(seen).level == "ok", record
        elif record["kind"] == "layers":
            health.layers(LayerObservation(record["step"], {k: LayerFigures(*v) for k, v in record["layers"].items()}))
        elif record["kind"] == "eval":
            health.evaluation(record["step"], record["loss"])
    assert health.status().level == "ok"
    kinds = {record["kind"] for record in found}
    assert {"step", "layers", "eval"} <= kinds


def test_the_page_of_rules_is_written_from_them() -> None:
    named = {setting for name in HEALTH_RULES.own() for setting in HEALTH_RULES.get(name).settings}
    assert named <= set(Config.model_fields)
    page = Path(__file__).parents[3] / "docs" / "health.md"
    assert page.read_text() == health_docs.page(), "python -m lumina.train.health.docs > docs/health.md"
