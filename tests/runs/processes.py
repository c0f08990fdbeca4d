"""Real training runs for tests: started as processes, killed, resumed and compared bit for bit.

`Runs.train` forks every rank from a server that has imported torch and DeepSpeed already, which saves seconds of
imports a start; each rank is an ordinary process that calls the command line. `Runs.close` leaves no process behind.
The real launcher is started in tests/multinode.

Where there is a GPU they run on the CPU all the same: a server that has asked CUDA for devices cannot be forked into
processes that use them, and the runs compared have more ranks than a machine may have GPUs.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lumina import checkpoint
from lumina.cluster import free_port
from lumina.monitor import read_metrics
from tests.small_tokenizer import small_vocabulary, write_tokenizer

ROOT = Path(__file__).parents[2]
DEEPSPEED = Path(sys.executable).with_name("deepspeed")
PATIENCE = 400.0  # seconds; DeepSpeed's first use on a machine compiles its operators for minutes

# With a vocabulary of 512 (small_tokenizer.py) a step takes milliseconds. Lumina's own has 100,352, whose output layer
# is nearly all of a tiny model: it is trained with in the quickstart, tests/test_cli.py and where a test says so.
TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "seq_length": 64}

Patch = Callable[[int], None]  # called with the rank in its process before the command


# --- Data -----------------------------------------------------------------------------------------

_SUBJECTS = "my sister|our dog|the weather|that film|the old library|your garden|a long train ride|the football team"
_FEELINGS = "makes me happy|was a surprise|could be better|reminds me of home|is worth the wait|keeps me awake"
_OPENERS = "Honestly,|You know,|Well,|To be fair,|I think|Yesterday I said that|Funny, but|As far as I can tell"


def _sentence(rng: random.Random) -> str:
    opener, subject, feeling = (rng.choice(words.split("|")) for words in (_OPENERS, _SUBJECTS, _FEELINGS))
    return f"{opener} {subject} {feeling}{rng.choice('.!?')}"


def write_conversations(path: Path, count: int, seed: int, turns: int = 3) -> Path:
    """`count` conversations of at most `turns` questions and answers; each answer is one sentence or two."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            messages = []
            for _ in range(rng.randint(1, turns)):
                answer = " ".join(_sentence(rng) for _ in range(rng.randint(1, 2)))
                messages += [{"role": "user", "content": _sentence(rng)}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


# --- Command lines --------------------------------------------------------------------------------


def arguments(
    run: Path, data: Path, *, stage: int | str | None = None, whole_vocabulary: bool = False, **settings: Any
) -> list[str]:
    """`lumina train`'s arguments for a tiny run in the folder `run`; `stage` names one of ds_configs/zero*.json."""
    vocabulary = {} if whole_vocabulary else small_vocabulary(_tokenizer())
    settings = {"num_workers": 1, "epochs": 100, "keep_last": 2, **TINY, **vocabulary, **settings}
    line = ["--config", "nano", "--train-data", str(data), "--output-dir", str(run.parent)]
    line += ["--experiment-name", run.name]
    if stage is not None:
        line += ["--ds_config", str(ROOT / "ds_configs" / f"zero{stage}.json")]
    return line + [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


@cache
def _tokenizer() -> Path:
    """A small tokenizer's folder, which lives as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="lumina-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_tokenizer(folder / "tokenizer")


def clean_environment() -> dict[str, str]:
    """This process's environment without what other tests, or a process group made in this process, left in it."""
    # COLUMNS and LINES are set by pytest-xdist, and go before the size of a terminal.
    launcher = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "CROSS_", "DEEPSPEED_")
    leftovers = (*launcher, "TRITON_", "LUMINA_", "CUDA_", "COLUMNS", "LINES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(leftovers)}
    return {**kept, "OMP_NUM_THREADS": "1", "PATH": f"{DEEPSPEED.parent}:{kept['PATH']}"}


# --- Processes ------------------------------------------------------------------------------------


def _rank(argv: list[str], environment: dict[str, str], log: str, patch: Patch | None) -> None:
    """One rank's process."""
    for number, stream in ((1, "out"), (2, "err")):
        descriptor = os.open(f"{log}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    faulthandler.enable()  # see Job.wait
    os.environ.update(environment)
    if patch is not None:
        patch(int(environment.get("RANK", 0)))
    from lumina.cli import main

    sys.exit(main(argv))


@dataclass
class Job:
    """A started run: its ranks' processes and what they print."""

    ranks: list[Any]
    logs: list[Path]
    metrics: Path
    _earlier: int  # inode of the metrics that an earlier life of the run left

    def step(self) -> int:
        """The last step that this life of the run has recorded."""
        with suppress(OSError):
            if self.metrics.stat().st_ino != self._earlier:
                return max((record["step"] for record in read_metrics(self.metrics)), default=0)
        return 0

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.step() < step:
            assert all(rank.is_alive() for rank in self.ranks), f"ended before step {step}:\n{self.stderr()}"
            assert time.monotonic() < deadline, f"no step {step} after {PATIENCE} s"
            time.sleep(0.005)

    def wait_for_checkpoint(self) -> None:
        """Until one has its name: it is written beside the steps."""
        deadline = time.monotonic() + PATIENCE
        while not checkpoint.list_checkpoints(self.metrics.parent / "checkpoints"):
            assert all(rank.is_alive() for rank in self.ranks), f"ended without a checkpoint:\n{self.stderr()}"
            assert time.monotonic() < deadline, f"no checkpoint after {PATIENCE} s"
            time.sleep(0.005)

    def wait(self) -> list[int]:
        """The exit code of every rank; minus the signal's number where one ended it."""
        deadline = time.monotonic() + PATIENCE
        for rank in self.ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        hung = [number for number, rank in enumerate(self.ranks) if rank.is_alive()]
        if hung:
            for number in hung:
                self.signal(signal.SIGABRT, number)  # it says where each of its threads stands
            time.sleep(1.0)
            self.end()
        assert not hung, f"ranks {hung} still ran after {PATIENCE} s:\n{self.stderr()}"
        return [rank.exitcode for rank in self.ranks]

    def kill(self) -> None:
        """SIGKILL every rank. None may have ended by itself: what is resumed then would be a run that nothing broke."""
        self.end()
        codes = [rank.exitcode for rank in self.ranks]
        assert codes == [-signal.SIGKILL] * len(codes), f"ended before the kill, {codes}:\n{self.stderr()}"

    def end(self) -> None:
        """SIGKILL what still runs."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        os.kill(self.ranks[rank].pid, number)

    def stdout(self) -> str:
        return "".join(log.with_suffix(".out").read_text() for log in self.logs)

    def stderr(self) -> str:
        return "".join(log.with_suffix(".err").read_text() for log in self.logs)


class Runs:
    """Starts runs and cleans up after them. Logs go to `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._jobs: list[Job] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.runs.preload"])
        # By PYTHONPATH: Python before 3.12.3 ignores an import that fails in the server, and does not pass sys.path on.
        on_the_cpu = {"CUDA_VISIBLE_DEVICES": ""}  # in the ranks too, which have the server's environment
        with mock.patch.dict(os.environ, {**clean_environment(), **on_the_cpu, "PYTHONPATH": str(ROOT)}, clear=True):
            forkserver.ensure_running()

    def start(
        self,
        argv: Sequence[str],
        world: int = 1,
        patch: Patch | None = None,
        *,
        own: Sequence[Sequence[str]] = (),
        machines: bool = False,
    ) -> Job:
        """Start `lumina train ARGV` on `world` ranks and come back at once. own: more words of each rank; machines:
        each rank is told that it is alone on a machine of its own."""
        port = free_port()
        names = ("--output-dir", "--experiment-name")
        run = Path(*(argv[argv.index(name) + 1] for name in names)) if names[0] in argv else self._folder
        metrics = run / "metrics.jsonl"
        earlier = metrics.stat().st_ino if metrics.exists() else -1
        logs = [self._folder / f"{len(self._jobs):03d}-{rank}" for rank in range(world)]
        ranks = []
        for rank, log in enumerate(logs):
            local, local_world = (0, 1) if machines else (rank, world)
            placed = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": local_world}
            environment = {name: str(value) for name, value in placed.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment = environment if world > 1 else {}  # one process needs no launcher
            words = ["train", *argv, *(own[rank] if own else ())]
            process = self._context.Process(target=_rank, args=(words, environment, str(log), patch))
            process.start()
            ranks.append(process)
        self._jobs.append(Job(ranks, logs, metrics, earlier))
        return self._jobs[-1]

    def train(self, argv: Sequence[str], world: int = 1) -> Job:
        """Start a run and see it through."""
        job = self.start(argv, world)
        codes = job.wait()
        assert codes == [0] * world, f"exit codes {codes}:\n{job.stdout()}\n{job.stderr()}"
        return job

    def refusal(self, argv: Sequence[str]) -> str:
        """What a run says that is refused."""
        job = self.start(argv)
        assert job.wait() == [2]
        assert "Traceback" not in job.stderr()
        return job.stderr()

    def close(self) -> None:
        """Kill what still runs."""
        for job in self._jobs:
            job.end()


def held_at(step: int, rank: int) -> None:
    """In a rank's process: the step after `step`, and each later one, begins once a signal asks the run to stop. A run
    that is to be killed, or asked to stop, then has not ended before, however late that comes."""
    from lumina.train import loop

    plain = loop.take_step

    def held(run: loop.Run, data: Any) -> Any:
        while data.step >= step and run.stop.signal is None:
            time.sleep(0.01)
        return plain(run, data)

    loop.take_step = held


def held_until(step: int, path: Path, rank: int) -> None:
    """In a rank's process: the step after `step` begins once the file is there."""
    from lumina.train import loop

    plain = loop.take_step

    def held(run: loop.Run, data: Any) -> Any:
        while data.step >= step and not path.exists():
            time.sleep(0.01)
        return plain(run, data)

    loop.take_step = held


# --- Results --------------------------------------------------------------------------------------

State = dict[tuple[str, str], torch.Tensor]


def newest(run: Path) -> Path:
    """The newest named checkpoint of a run."""
    return checkpoint.list_checkpoints(run / "checkpoints")[0]


def state(saved: Path) -> State:
    """Weights and moments of a checkpoint, whole, by (kind, parameter's name)."""
    reader = checkpoint.CheckpointReader(saved)
    values = {}
    for name in reader.names():
        for kind in (checkpoint.MASTER, *reader.keys):
            values[kind, name] = torch.empty(reader.numel(name))
            reader.read(kind, name, 0, values[kind, name])
    assert {kind for kind, _ in values} == {"master", "exp_avg", "exp_avg_sq"}
    return values


def final(run: Path, steps: int) -> State:
    """The state of a run that must have ended at `steps`."""
    saved = newest(run)
    assert saved.name == checkpoint.name_of(steps)
    assert checkpoint.integrity_error(saved) is None
    return state(saved)


def differing(one: State, other: State) -> list[tuple[str, str]]:
    """What is not the same bit for bit."""
    assert one.keys() == other.keys()
    bits = lambda tensor: tensor.view(torch.int32)
    return [key for key in one if not torch.equal(bits(one[key]), bits(other[key]))]


def steps(run: Path) -> list[dict[str, Any]]:
    """The step records of a run's metrics."""
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "step"]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in steps(run)]
