"""Nodes that die, are cut off or stop, and come back: the run goes on without them and takes them in again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import BIN, Cluster, Job, until
from runs import Runs, arguments, steps
from runs import newest as newest_checkpoint

from lumina.chat import Tokenizer
from lumina.config import load
from lumina.data import GlobalOrder, prepare
from lumina.data.order import sample_sums, samples_id
from lumina.monitor import read_metrics
from lumina.train import checkpoint

RANK = Path(__file__).with_name("rank.py")
SAVE_EVERY = 5
# The rate does not depend on how long the run will be, which the test decides.
SETTINGS = {
    "precision": "fp32", "batch_size": 2, "global_batch_size": 8, "gradient_accumulation_steps": 2, "seed": 5,
    "learning_rate": 1e-3, "lr_scheduler": "constant", "warmup_ratio": 0.0, "save_every_n_batches": SAVE_EVERY,
}  # fmt: skip


def at(run: Path) -> int:
    """The last step on record."""
    return max((record["step"] for record in steps(run)), default=0)


def worlds(run: Path) -> list[int]:
    """The world size of each start of the run so far."""
    log = run / "train.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split(" process(es)")[0].split()[-1]) for line in lines if "process(es)" in line]


def expect_every_sample(run: Path, conversations: Path) -> None:
    """Each step is on record once, with the very samples that law 1 gives it."""
    data = prepare([conversations], load(str(run / "config.yaml")), Tokenizer.load())
    order = GlobalOrder(data.num_samples, SETTINGS["global_batch_size"], SETTINGS["seed"], data.fingerprint)
    records = steps(run)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    wanted = [samples_id(*sample_sums(order.indices(record["step"] - 1))) for record in records]
    assert [record["samples"] for record in records] == wanted


def launch(cluster: Cluster, words: list[str], *options: str, **environment: str) -> Job:
    line = [str(BIN / "lumina"), "launch", "--hostfile", cluster.hostfile(), *options, "--", str(RANK), "train", *words]
    return cluster.start("head", line, **environment)


def alive_and(job: Job, holds: Callable[[], bool]) -> Callable[[], bool]:
    def check() -> bool:
        assert job.process.poll() is None, f"the job ended:\n{job.output()[-5000:]}"
        return holds()

    return check


@pytest.mark.timeout(600)
def test_lost_nodes_are_done_without_and_taken_in_again(
    cluster: Cluster, runs: Runs, conversations: Path, place: Path
) -> None:
    run = place / "run"
    words = arguments(run, conversations, stage=2, max_steps=100_000, eval_data=f"[{conversations}]", **SETTINGS)
    words += ["--set", "eval_every_n_batches=100000"]
    job = launch(cluster, words, "--min-nodes", "1", PAUSE="0.3")
    failures = (
        (cluster.kill, cluster.revive),
        (cluster.cut, cluster.join),
        (cluster.stop, cluster.resume),
    )
    for lose, bring_back in failures:
        starts = len(worlds(run))
        began_at = at(run)
        until(
            alive_and(job, lambda n=began_at: at(run) >= n + SAVE_EVERY + 2 and worlds(run)[-1:] == [2]),
            90,
            "slow start",
        )
        lose("n1")
        lost_at, when = at(run), time.monotonic()
        until(alive_and(job, lambda n=starts: len(worlds(run)) > n and worlds(run)[-1] == 1), 60, "no world of one")
        until(alive_and(job, lambda: at(run) > 0), 60, "no step in a world of one")
        assert time.monotonic() - when < 60
        resumed = [line for line in (run / "train.log").read_text().splitlines() if "resumed at step" in line][-1]
        assert int(resumed.rpartition(" ")[2]) > lost_at - SAVE_EVERY - 1
        bring_back("n1")
        until(alive_and(job, lambda n=starts: len(worlds(run)) > n + 1 and worlds(run)[-1] == 2), 90, "no world of two")
    last = at(run)
    until(alive_and(job, lambda: at(run) > last + 2), 60, "no step after the last return")
    cluster.run("head", ["pkill", "-TERM", "-f", "lumina launch"])
    assert job.wait(60) == 75, job.output()[-5000:]
    for name in ("n0", "n1"):
        assert cluster.processes(name, "lumina") == []
    expect_every_sample(run, conversations)

    end = checkpoint.read_progress(newest_checkpoint(run))[0].step + 1
    runs.train([*words, "--set", f"max_steps={end}", "--resume", "auto"])
    calm = place / "calm"
    calm_words = [word.replace(str(run.name), calm.name) if word == run.name else word for word in words]
    runs.train([*calm_words, "--set", f"max_steps={end}"])
    evaluated = [
        [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "eval"][-1] for folder in (run, calm)
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-3)
    assert [r["samples"] for r in steps(run)] == [r["samples"] for r in steps(calm)]
