"""What the tests of elastic jobs share: starting one, and reading what its run did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lumina.chat import open_tokenizer
from lumina.config import load
from lumina.data import GlobalOrder, prepare, sample_sums, samples_id
from tests.multinode.cluster import BIN, Cluster, Job
from tests.runs import steps

RANK = Path(__file__).with_name("rank.py")
SAVE_EVERY = 5
# The rate does not depend on how long the run will be, which some tests decide as they go.
SETTINGS = {
    "seq_length": 32,
    "precision": "fp32",
    "batch_size": 2,
    "global_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "seed": 5,
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "warmup_ratio": 0.0,
    "save_every_n_batches": SAVE_EVERY,
}


def launch(cluster: Cluster, words: list[str], *options: str, **environment: str) -> Job:
    """`lumina launch` on the head over all nodes, with tests/multinode/rank.py in place of `lumina`."""
    exports = [word for name in environment for word in ("--export", name)]
    line = [str(BIN / "lumina"), "launch", "--hostfile", cluster.hostfile(), *exports, *options, "--", str(RANK)]
    return cluster.start("head", [*line, "train", *words], **environment)


def alive_and(job: Job, holds: Callable[[], bool]) -> Callable[[], bool]:
    """`holds`, for waiting; fails at once when the job has ended."""

    def check() -> bool:
        assert job.process.poll() is None, f"the job ended:\n{job.output()[-5000:]}"
        return holds()

    return check


def at(run: Path) -> int:
    """The last step on record."""
    return max((record["step"] for record in steps(run)), default=0)


def worlds(run: Path) -> list[int]:
    """The world size of each start of the run so far."""
    log = run / "train.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split(" process(es),")[0].split()[-1]) for line in lines if "process(es)," in line]


def expect_every_sample(run: Path, conversations: Path) -> None:
    """Each step is on record once, with the very samples that law 1 gives it."""
    config = load(str(run / "config.yaml"))
    data = prepare([conversations], config, open_tokenizer(config.tokenizer))
    order = GlobalOrder(data.num_samples, SETTINGS["global_batch_size"], config.seed, data.fingerprint)
    records = steps(run)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    wanted = [samples_id(*sample_sums(order.indices(record["step"] - 1))) for record in records]
    assert [record["samples"] for record in records] == wanted


def expect_nobody(cluster: Cluster) -> None:
    """No process of a job is left on any node."""
    left = {name: cluster.command_lines(name, "lumina") for name in cluster.places}
    assert not any(left.values()), left
