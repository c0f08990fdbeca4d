"""Ranks that share rows: laws 1, 2 and 6 hold with sequence_parallel_size as another name for the world size."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

import tests.runs as real
from lumina.cluster import EXIT_STOPPED
from lumina.infer import import_hf
from lumina.monitor import read_metrics, read_run
from tests.infer.hf_models import make_hf
from tests.runs import Runs, arguments, differing, final, held_at, losses, state, steps
from tests.runs.pairs import write_pairs

pytestmark = pytest.mark.timeout(900)  # the first start on a machine compiles DeepSpeed's operators

# 23 conversations, which no number of readers here divides, and rows of no whole tiles.
SETTINGS: dict[str, Any] = {
    "precision": "fp32",
    "global_batch_size": 7,
    "batch_size": 2,
    "seq_length": 160,
    "num_heads": 4,
    "num_kv_heads": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "max_steps": 20,
    "lr_scheduler": "constant",
    "warmup_ratio": 0.0,
    "layer_stats_every": 5,
    "eval_fraction": 0.2,
    "eval_every_n_batches": 10,
}


# Of a micro-batch's tokens, in tiles that do not divide them and differ in number from rank to rank where P = 1; and of
# heads, in groups.
TILES: dict[str, Any] = {"mlp_tile_tokens": 24, "attention_head_groups": 2}
UNPACKED: dict[str, Any] = {"packing": False}
SHARED = ((2, 1), (2, 2), (4, 1), (4, 2), (4, 4))  # (world, ranks of a row): of two and four ranks every way
OFFLOADED: dict[str, Any] = TILES | {"gradient_checkpointing": True, "activation_offloading": True}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real.write_conversations(tmp_path_factory.mktemp("few") / "few.jsonl", 23, seed=5, turns=2)


@dataclass
class Alone:
    """Runs on one process, each made once."""

    runs: Runs
    data: Path
    folder: Path
    _made: dict[str, Path] = field(default_factory=dict)

    def run(self, **settings: Any) -> Path:
        key = repr(sorted(settings.items()))
        if key not in self._made:
            run = self._made[key] = self.folder / f"run-{len(self._made)}"
            self.runs.train(arguments(run, self.data, **{**SETTINGS, **settings}))
        return self._made[key]


@pytest.fixture(scope="module")
def alone(runs: Runs, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    folder = tmp_path_factory.mktemp("alone")
    yield Alone(runs, few, folder)
    shutil.rmtree(folder)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind]


def held(run: Path, other: Path, rel: float = 1e-5) -> None:
    """All that a run tells of its numbers: losses, what the steps were made of, evaluations, layers."""
    assert losses(run) == pytest.approx(losses(other), rel=rel)
    for name in ("samples", "tokens", "lr"):
        assert [record[name] for record in steps(run)] == [record[name] for record in steps(other)], name
    norms = [[record["grad_norm"] for record in steps(one)] for one in (run, other)]
    assert norms[0] == pytest.approx(norms[1], rel=100 * rel)
    evaluated = [[record["loss"] for record in records(one, "eval")] for one in (run, other)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=rel)
    assert evaluated[0], "it evaluated"
    for one, other_one in zip(records(run, "eval"), records(other, "eval"), strict=True):
        positions, expected = one["by_position"], other_one["by_position"]
        for name in ("from", "to", "tokens"):
            assert [row[name] for row in positions] == [row[name] for row in expected]
        assert [row["loss"] for row in positions] == pytest.approx([row["loss"] for row in expected], rel=rel)
        tokens = sum(row["tokens"] for row in positions)
        assert sum(row["loss"] * row["tokens"] for row in positions) / tokens == pytest.approx(one["loss"], rel=1e-6)
        assert len(positions) > 2, "several ranges"
    layers = [[record["layers"] for record in records(one, "layers")] for one in (run, other)]
    assert layers[0], "it measured the layers"
    for found, expected in zip(*layers, strict=True):
        for name in expected:
            assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def test_two_ranks_that_share_rows(alone: Alone, runs: Runs, few: Path, place: Path) -> None:
    """With accumulation, recomputed layers, evaluations and sample answers; the numbers in its log count a row once."""
    told = {"max_steps": 11, "sample_prompts": "[hello]"}
    settings = SETTINGS | told | {"gradient_checkpointing": 2, "straggler_interval": 5}
    line = arguments(place / "run", few, stage=2, **settings)
    runs.train([*line, "--sequence-parallel", "2"], 2)
    expected = alone.run(**told)
    held(place / "run", expected)
    answers = [[json.loads(line) for line in (run / "samples.jsonl").open()] for run in (place / "run", expected)]
    assert answers[0] == answers[1] != []
    for compared in records(place / "run", "ranks"):  # 23 conversations fill both parts of a row
        assert len(compared["flops"]) == 2
        assert max(compared["flops"]) < 3 * min(compared["flops"])
    assert {record["batches"] for record in steps(place / "run")} <= {2, 3, 4}, "of two samples each, on each rank"
    log = (place / "run/train.log").read_text()
    assert "1 group(s) of 2 processes" in log
    # Half of 4 + 2 + 2 heads there and 4 back, each of 8 numbers of 4 bytes.
    assert "exchanges: 192 bytes sent a token and layer forward" in log
    assert "share each micro-batch's tokens, each group on one node (" in log
    for record in steps(place / "run"):  # 11 comes after an evaluation
        # Two layers forward and backward, one of them forward again; half of the tokens, filled up to tiles of 64.
        tokens = record["exchanged_bytes"] / 192 / 5
        assert record["tokens"] / 2 <= tokens <= record["tokens"] / 2 + 4 * 64
        assert tokens % 64 == 0
        assert record["seconds"]["exchange"] > 0
    assert all(one["exchanged_bytes"] is None and "exchange" not in one["seconds"] for one in steps(expected))


@pytest.mark.long
@pytest.mark.parametrize(
    ("world", "size", "stage", "more"),
    [
        *((2, 2, stage, {}) for stage in (0, 1, 2, 3)),
        *((4, 2, stage, {}) for stage in (0, 1, 2, 3)),
        *((4, 4, stage, {}) for stage in (0, 1, 2, 3)),
        *((world, 2, 2, {"num_kv_heads": kv}) for kv in (1, 4) for world in (2, 4)),
        *((4, 4, 3, {"num_kv_heads": kv}) for kv in (1, 4)),
        *((world, size, stage, UNPACKED) for world, size in ((1, 1), *SHARED) for stage in (0, 1, 2, 3)),
        (2, 1, 2, {}),
        (4, 1, 3, {}),
        (3, 3, 2, {"num_heads": 3, "num_kv_heads": 1, "hidden_size": 48}),
        (4, 2, 2, {"batch_size": 1}),
        (4, 2, 3, {"gradient_checkpointing": True, "batch_size": 4}),
        *((2, size, stage, TILES) for size in (1, 2) for stage in (0, 1, 2, 3)),
        *((1, 1, stage, OFFLOADED) for stage in (0, 1, 2, 3)),
        *((2, 2, stage, OFFLOADED) for stage in (0, 1, 2, 3)),
    ],
)
def test_every_way_to_share(
    world: int, size: int, stage: int, more: dict[str, Any], alone: Alone, runs: Runs, few: Path, place: Path
) -> None:
    kept = {"save_every_n_batches": 1, "save_async": False, "keep_last": 30, "max_grad_norm": 0.0}
    # Adam's first update is the gradient's sign: at the default epsilon, elements whose gradient is rounding differ by
    # 2e-6 of the weights between one process's own micro-batches of one and two samples.
    kept["adam_eps"] = 1e-5
    expected = alone.run(**{name: value for name, value in more.items() if name in MODEL}, **kept)
    settings = SETTINGS | kept | more | {"sequence_parallel_size": size}
    runs.train(arguments(place / "run", few, stage=stage, **settings), world)
    held(place / "run", expected)
    first = [state(run / "checkpoints/step-00000001") for run in (place / "run", expected)]
    for (kind, name), value in first[1].items():
        difference = (first[0][kind, name].double() - value.double()).norm() / value.double().norm()
        assert difference <= 1e-6, (kind, name)


MODEL = ("num_heads", "num_kv_heads", "hidden_size", "packing")


def _count_reduced(file: Path, rank: int) -> None:
    """Have this process's reductions write how many elements each of them takes."""
    out = file.with_suffix(f".{rank}").open("w", buffering=1)

    def elements(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel()
        return sum(map(elements, value)) if isinstance(value, list) else 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def reduce(*args: Any, **options: Any) -> Any:
            out.write(f"{max(map(elements, [*args, *options.values()]))}\n")
            return call(*args, **options)

        return reduce

    for name in ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base"):
        setattr(dist, name, counted(getattr(dist, name)))


@pytest.mark.long  # that autograd has each gradient once is what tests/model/memory/test_tiles.py holds
@pytest.mark.parametrize(("size", "stage"), [(1, 0), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3)])
def test_tiles_reduce_each_gradient_as_often_as_without(
    size: int, stage: int, runs: Runs, few: Path, place: Path
) -> None:
    reduced = []
    settings = SETTINGS | {"max_steps": 2, "eval_fraction": 0.0, "sequence_parallel_size": size}
    for name, more in (("plain", {}), ("tiles", TILES), ("offloaded", OFFLOADED)):
        file = place / f"{name}.reduced"
        line = arguments(place / name, few, stage=stage, **{**settings, **more})
        assert runs.start(line, 2, patch=partial(_count_reduced, file)).wait() == [0, 0]
        reduced.append([sum(map(int, file.with_suffix(f".{rank}").read_text().split())) for rank in (0, 1)])
    assert reduced[0] == reduced[1] == reduced[2]
    weights = sum(value.numel() for (kind, _), value in final(place / "plain", 2).items() if kind == "master")
    assert min(reduced[0]) > 2 * weights, "two steps' gradients are among them"


@pytest.mark.long
def test_bfloat16_within_its_rounding(alone: Alone, runs: Runs, few: Path, place: Path) -> None:
    """Two and four ranks stay as near to float32 as one process in bfloat16 does."""
    exact, rounded = losses(alone.run()), losses(alone.run(precision="bf16"))
    far = max(abs(a - b) for a, b in zip(exact, rounded, strict=True))
    for world in (2, 4):
        settings = SETTINGS | {"precision": "bf16", "sequence_parallel_size": 2}
        runs.train(arguments(place / f"run-{world}", few, stage=2, **settings), world)
        found = losses(place / f"run-{world}")
        assert max(abs(a - b) for a, b in zip(exact, found, strict=True)) <= 2 * far + 1e-6


@pytest.mark.long
@pytest.mark.parametrize(
    ("world", "size", "stage"), [(world, size, stage) for world, size in SHARED for stage in (0, 1, 2, 3)]
)
def test_one_step_in_bfloat16_within_its_rounding(
    world: int, size: int, stage: int, alone: Alone, runs: Runs, few: Path, place: Path
) -> None:
    """A step's gradient, of which the first moment is a tenth, and its weights.

    The reference is float32 on one process. Of the gradient, one process in bfloat16 is away from it by rounding: by a
    few units of 2^-8, most where it adds the samples one by one, two by two or all at once. No more than twice that is
    allowed. The weights follow: at an epsilon of one, Adam's first update, lr * g / (|g| + 1), is nowhere steeper than
    lr, so two gradients make weights that differ by lr times their difference, and by float32's rounding.
    """
    step = {"max_steps": 1, "max_grad_norm": 0.0, "adam_eps": 1.0, "learning_rate": 0.1}
    started = lambda run: state(run / "checkpoints/step-00000001")
    distance = lambda one, other: (one.double() - other.double()).norm()
    exact = started(alone.run(**step))
    rounded = [started(alone.run(precision="bf16", batch_size=size, **step)) for size in (1, 2, 7)]
    settings = SETTINGS | step | {"precision": "bf16", "sequence_parallel_size": size}
    runs.train(arguments(place / "run", few, stage=stage, **settings), world)
    found = started(place / "run")
    for name in (name for kind, name in exact if kind == "exp_avg"):
        gradient, weights = 10 * exact["exp_avg", name].double(), rounded[0]["master", name]
        away = [10 * distance(one["exp_avg", name], exact["exp_avg", name]) for one in (*rounded, found)]
        assert 2**-10 * gradient.norm() < max(away[:3]) < 4 * 2**-8 * gradient.norm(), name
        assert away[3] <= 2 * max(away[:3]), name
        apart = 0.1 * (away[0] + away[3]) + 2**-22 * weights.norm()
        assert distance(found["master", name], weights) <= apart, name


@pytest.mark.long
@pytest.mark.parametrize(("world", "stage"), [(2, 2), (4, 2), (4, 3)])
def test_killed_and_resumed_bit_for_bit(world: int, stage: int, runs: Runs, few: Path, place: Path) -> None:
    settings = SETTINGS | {"sequence_parallel_size": 2, "save_every_n_batches": 3, "max_steps": 14}
    runs.train(arguments(place / "whole", few, stage=stage, **settings), world)
    line = arguments(place / "killed", few, stage=stage, **settings)
    job = runs.start(line, world, partial(held_at, 13))
    job.wait_for_step(7)
    job.kill()
    runs.train([*line, "--resume", "auto"], world)
    assert [record["step"] for record in steps(place / "killed")] == list(range(1, 15))
    assert differing(final(place / "killed", 14), final(place / "whole", 14)) == []


@pytest.mark.long
def test_resized_between_groups_and_sizes(alone: Alone, runs: Runs, few: Path, place: Path) -> None:
    """(groups, size): (1, 2), (2, 1), (1, 1), (2, 2), one after another."""
    expected, run = alone.run(), place / "run"
    for number, (world, size, stage) in enumerate([(2, 2, 2), (2, 1, 3), (1, 1, 0), (4, 2, 1)], 1):
        settings = SETTINGS | {"sequence_parallel_size": size}
        line = [*arguments(run, few, stage=stage, **settings), "--resume", "auto"]
        if number == 4:
            runs.train(line, world)
            break
        job = runs.start(line, world, partial(held_at, 18))
        job.wait_for_step(5 * number - 2)
        for rank in range(world):
            job.signal(signal.SIGTERM, rank)
        assert job.wait() == [EXIT_STOPPED] * world, job.stderr()
    assert [record["step"] for record in steps(run)] == list(range(1, 21))
    assert losses(run) == pytest.approx(losses(expected), rel=1e-5)
    assert [record["samples"] for record in steps(run)] == [record["samples"] for record in steps(expected)]


def _one_launch(rank: int, *, held: bool) -> None:
    os.environ["LUMINA_JOB"] = "night"
    if held:
        held_at(8, rank)


@pytest.mark.long
def test_a_launch_that_lost_a_rank_goes_on_with_what_fits(alone: Alone, runs: Runs, few: Path, place: Path) -> None:
    expected, run = alone.run(max_steps=10), place / "run"
    line = arguments(run, few, **SETTINGS | {"sequence_parallel_size": 2, "max_steps": 10, "save_every_n_batches": 3})
    for world, ends in ((2, False), (1, False), (2, True)):
        job = runs.start(line, world, patch=partial(_one_launch, held=not ends))
        if not ends:
            job.wait_for_step(3 if world == 2 else 6)
            for rank in range(world):
                job.signal(signal.SIGTERM, rank)
        assert job.wait() == [0 if ends else EXIT_STOPPED] * world, job.stderr()
        told = "sequence_parallel_size 2 does not divide the 1 processes that are left: 1 for now" in job.stderr()
        assert told == (world == 1)
        kept = yaml.safe_load((run / "config.yaml").read_text())
        assert kept["sequence_parallel_size"] == 2, "the run's own, of the next start"
        assert read_run(run)["config"]["sequence_parallel_size"] == world
        if not ends:  # not by one process, which could not hold whole rows
            assert "To go on: the same command with --resume auto" in (run / "train.log").read_text()
            assert "lumina train --resume" not in (run / "train.log").read_text()
    assert losses(run) == pytest.approx(losses(expected), rel=1e-5)
    assert [record["samples"] for record in steps(run)] == [record["samples"] for record in steps(expected)]


# --- Over another run's weights ---


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Models of four heads, by how many KV heads they have."""
    folder, made = tmp_path_factory.mktemp("bases"), {}
    for kv, family in ((1, "tinyllama"), (2, "qwen2"), (4, "llama2")):
        make_hf(folder / family, family)
        made[kv] = import_hf(folder / family, folder / f"run-{kv}")
    return made


DPO: dict[str, Any] = {"objective": "dpo", "dpo_beta": 0.2}
LORA: dict[str, Any] = {"lora_rank": 4}


def over(base: Path, run: Path, data: Path, stage: int, **settings: Any) -> list[str]:
    line = ["--config", "nano", "--train-data", str(data), "--output-dir", str(run.parent), "--init-from", str(base)]
    line += ["--experiment-name", run.name, "--ds_config", str(real.ROOT / "ds_configs" / f"zero{stage}.json")]
    fixed = {name: SETTINGS[name] for name in ("precision", "lr_scheduler", "warmup_ratio", "learning_rate")}
    chosen = fixed | {"num_workers": 1, "epochs": 100, "global_batch_size": 7, "batch_size": 2} | settings
    return line + [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]


@pytest.mark.long
@pytest.mark.parametrize(
    ("kv", "settings", "ways"),
    [
        (2, LORA | {"gradient_checkpointing": True}, [(2, 2, 2), (2, 2, 3), (4, 2, 2)]),
        (2, LORA | OFFLOADED, [(2, 2, 2), (2, 2, 3), (4, 2, 2)]),
        (2, DPO, [(2, 2, 0), (2, 2, 2), (2, 2, 3), (4, 2, 2), (2, 1, 1), (4, 1, 3), (4, 4, 3)]),
        (2, DPO | LORA | OFFLOADED, [(2, 2, 2), (2, 2, 3), (4, 2, 2)]),
        *((kv, LORA | more, [(2, 2, 1), (4, 2, 3), (4, 4, 2)]) for kv in (1, 4) for more in ({}, DPO)),
        (2, LORA, [(2, 1, 2), (4, 1, 3), (2, 2, 0), (4, 4, 3)]),
    ],
)
def test_adapters_and_preferences(
    kv: int,
    settings: dict[str, Any],
    ways: list[tuple[int, int, int]],
    bases: dict[int, Path],
    few: Path,
    runs: Runs,
    place: Path,
) -> None:
    """20 steps' losses, and the weights and moments of the first, as in `test_every_way_to_share`."""
    data = few if "objective" not in settings else write_pairs(place / "pairs.jsonl", 11, seed=5)
    settings = {**settings, "max_steps": 20, "save_every_n_batches": 1, "save_async": False, "keep_last": 30}
    # An adapter's b is its first update alone, at a small epsilon almost the gradient's sign, and rounding near zero.
    settings |= {"max_grad_norm": 0.0, "adam_eps": 1e-3}
    if "objective" in settings:
        settings |= {"eval_data": str(write_pairs(place / "held-out.jsonl", 5, seed=6)), "eval_every_n_batches": 10}
    plain = {name: value for name, value in settings.items() if name not in OFFLOADED}
    runs.train(over(bases[kv], place / "alone", data, 0, **plain))
    for world, size, stage in ways:
        run = place / f"run-{world}-{size}-{stage}"
        runs.train(over(bases[kv], run, data, stage, **settings, sequence_parallel_size=size), world)
        for kind in ("step", "eval"):
            for found, expected in zip(records(run, kind), records(place / "alone", kind), strict=True):
                assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5), found["step"]
                for name in filter(lambda name: name.startswith("rewards/"), expected):
                    if found["step"] > 1:  # before, what the model prefers is rounding
                        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (name, found["step"])
        assert [one["samples"] for one in steps(run)] == [one["samples"] for one in steps(place / "alone")]
        states = [state(one / "checkpoints/step-00000001") for one in (run, place / "alone")]
        for (kind, name), value in states[1].items():
            close = 1e-5 if kind == "master" and name.endswith(".b") else 1e-6
            assert (states[0][kind, name] - value).norm() <= close * value.norm(), (kind, name)


# --- What is refused ---


def test_ranks_that_do_not_make_whole_groups_are_refused(runs: Runs, few: Path, place: Path) -> None:
    told = runs.refusal(arguments(place / "run", few, **SETTINGS, sequence_parallel_size=2))
    assert "sequence_parallel_size 2 does not divide the number of processes, 1" in told
