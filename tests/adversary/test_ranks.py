"""Ranks that are not of one run: each line is a start of two ranks, on machines of their own, that must be refused.

Each rank stands in a folder of its own, as on its own disk: what is named without a folder differs or is missing there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.runs import Runs, arguments, write_conversations

SETTINGS = "warmup_ratio: 0.0\n"


def two_data_files(own: Path) -> None:
    for rank in range(2):
        write_conversations(own / str(rank) / "data.jsonl", 12, seed=rank)


def one_yaml(own: Path) -> None:
    (own / "0" / "settings.yaml").write_text(SETTINGS)


def two_yamls(own: Path) -> None:
    for rank in range(2):
        (own / str(rank) / "settings.yaml").write_text(f"{SETTINGS}weight_decay: 0.{rank}\n")


def two_documents(own: Path) -> None:
    for rank in range(2):
        (own / str(rank) / "ds.json").write_text(f'{{"zero_optimization": {{"stage": {rank + 1}}}}}')


def another_version(package: str, own: Path) -> None:
    """Installed on rank 1's node, as far as its metadata goes."""
    info = own / "1" / "packages" / f"{package}-99.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 99\n")


def nothing(own: Path) -> None:
    """Their folders are empty."""


def stand_in(own: Path, rank: int) -> None:
    """A rank's working folder, and where it finds its packages first."""
    os.chdir(own / str(rank))
    sys.path.insert(0, str(own / str(rank) / "packages"))


# What differs, how it is set up, the words of each rank, and what must be said.
Attack = tuple[str, Callable[[Path], None], Sequence[Sequence[str]], Sequence[str]]
YAML, DOCUMENT = ["--config", "settings.yaml"], ["--ds_config", "ds.json"]
ATTACKS: list[Attack] = [
    ("seed", nothing, [["--seed", "5"], ["--seed", "6"]], ["seed: 5 on rank 0", "6 on rank 1"]),
    ("learning rate", nothing, [[], ["--lr", "3e-4"]], ["learning_rate: 0.0001 on rank 0", "0.0003 on rank 1"]),
    ("data behind a path", two_data_files, [["--train-data", "data.jsonl"]] * 2, ["data: ", "on rank 1"]),
    ("a YAML on one node", one_yaml, [YAML] * 2, ["rank 1 on", "settings.yaml"]),
    ("a YAML that differs", two_yamls, [YAML] * 2, ["weight_decay: 0.0 on rank 0"]),
    ("a ds_config that differs", two_documents, [DOCUMENT] * 2, ["the file of ds_config", "on rank 1"]),
    ("a version", partial(another_version, "numpy"), [[], []], ["version of numpy: ", "99 on rank 1"]),
    ("a version not tried", partial(another_version, "deepspeed"), [[], []], ["rank 1 on", "deepspeed 99"]),
    ("data on one node", nothing, [[], ["--train-data", "missing.jsonl"]], ["rank 1 on", "missing.jsonl"]),
    ("an output folder", nothing, [["--output-dir", "runs"]] * 2, ["output_dir", "is not one folder of all machines"]),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack[0] for attack in ATTACKS])
def test_ranks_that_differ_are_refused(attack: Attack, runs: Runs, conversations: Path, place: Path) -> None:
    _, prepare, words, says = attack
    for rank in range(2):
        (place / str(rank)).mkdir()
    prepare(place)
    start = arguments(place / "run", conversations, max_steps=2, precision="fp32")
    if words[1][:2] == ["--train-data", "data.jsonl"]:
        at = start.index("--train-data")
        start = start[:at] + start[at + 2 :]
    own = [[*given, "--cache-dir", str(place / f"cache-{rank}")] for rank, given in enumerate(words)]
    job = runs.start(start, 2, partial(stand_in, place), own=own, machines=True)
    assert job.wait() == [2, 2], job.stderr()
    for log in job.logs:  # every rank says it: each node may have a log of its own
        text = log.with_suffix(".err").read_text()
        assert all(said in text for said in says), text
        assert "Traceback" not in text
    assert job.step() == 0, "it trained"
    left = [path for path in place.rglob("*") if path.name.startswith(".lumina-start") or path.name in ("runs", "run")]
    assert not left, "left behind"
