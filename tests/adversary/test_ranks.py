"""Ranks that are not of one run: each line is a start of two ranks, on machines of their own, that must be refused.

Each rank stands in a folder of its own, as on its own disk: what is named without a folder differs or is missing there.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from lumina import checkpoint
from lumina.chat import open_tokenizer
from lumina.cli import build_parser
from lumina.commands.common import load_config
from lumina.data import prepare
from tests.runs import Runs, arguments, write_conversations

pytestmark = pytest.mark.timeout(900)  # longer than the runs' own patience, which says where a rank hangs

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


def edited_code(own: Path) -> None:
    """A clone of Lumina's own version, with one more file."""
    (own / "1" / "code").mkdir()
    (own / "1" / "code" / "edited.py").write_text("")


def two_checkpoints(own: Path) -> None:
    """The manifest of one is written in another way: every file is whole, and they are not the same."""
    shutil.copytree(own / "trained", own / "0" / "trained")
    shutil.copytree(own / "trained", own / "1" / "trained")
    (manifest,) = (own / "1" / "trained" / "checkpoints").glob(f"step-*/{checkpoint.MANIFEST}")
    manifest.write_text(manifest.read_text() + "\n")


def nothing(own: Path) -> None:
    """Their folders are empty."""


def prepared_caches(own: Path, line: Sequence[str], rank: int) -> list[Path]:
    """A rank's cache, made as its start would make it: the files that hold samples."""
    config = load_config(build_parser()[0].parse_args(["train", *line, "--cache-dir", str(own / f"cache-{rank}")]))
    folder = prepare(config.train_data, config, open_tokenizer(config.tokenizer)).folder
    return sorted(folder.glob("*.arrow"))


def stand_in(own: Path, rank: int) -> None:
    """A rank's working folder, and where it finds its packages first."""
    os.chdir(own / str(rank))
    sys.path.insert(0, str(own / str(rank) / "packages"))
    if (own / str(rank) / "code").exists():
        import lumina

        lumina.__path__.append(str(own / str(rank) / "code"))


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
    ("Lumina's code", edited_code, [[], []], ["the code of lumina: ", "on rank 1"]),
    ("a version not tried", partial(another_version, "deepspeed"), [[], []], ["rank 1 on", "deepspeed 99"]),
    ("data on one node", nothing, [[], ["--train-data", "missing.jsonl"]], ["rank 1 on", "missing.jsonl"]),
    ("an output folder", nothing, [["--output-dir", "runs"]] * 2, ["output_dir", "is not one folder of all machines"]),
]


@pytest.mark.long  # it trains a checkpoint first; what differs is found as the lines above it find theirs
def test_weights_that_differ_are_refused(runs: Runs, conversations: Path, place: Path) -> None:
    runs.train(arguments(place / "trained", conversations, max_steps=1, precision="fp32"))
    attack = ("weights", two_checkpoints, [["--init-from", "trained"]] * 2, ["initial weights ", "on rank 1"])
    test_ranks_that_differ_are_refused(attack, runs, conversations, place)


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


SOUND = pytest.param(False, marks=pytest.mark.long, id="sound")  # the start that goes on costs as much again


@pytest.mark.parametrize("damaged", [pytest.param(True, id="damaged"), SOUND])
def test_a_cache_damaged_on_one_machine_is_refused_where_ranks_share_rows(
    damaged: bool, runs: Runs, conversations: Path, place: Path
) -> None:
    """Its fingerprint is the other's. The damaged sample would be another row, of another length, for one of them."""
    line = arguments(place / "run", conversations, max_steps=2, precision="fp32", sequence_parallel_size=2)
    first, second = (prepared_caches(place, line, rank) for rank in range(2))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    if damaged:
        tokens = max(second, key=lambda path: path.stat().st_size)
        spoilt = bytearray(tokens.read_bytes())
        spoilt[len(spoilt) // 2] ^= 0x40
        tokens.write_bytes(spoilt)
    own = [["--cache-dir", str(place / f"cache-{rank}")] for rank in range(2)]
    job = runs.start(line, 2, own=own, machines=True)
    assert job.wait() == ([2, 2] if damaged else [0, 0]), job.stderr()
    assert ("contents of the prepared data" in job.stderr()) == damaged
    assert job.step() == (0 if damaged else 2)
