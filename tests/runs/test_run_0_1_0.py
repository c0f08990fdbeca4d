"""Runs of version 0.1.0, kept as it left them, go on and come to the end that it came to (record_run_0_1_0.py).

`first` was made by the code of commit 32f6861 on one rank, `last` by that of 0e552ca on two. Each stands at its
checkpoint of step 9 and knows from answers.json that the samples of steps 12 to 14 are to be skipped.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lumina.chat import open_tokenizer
from lumina.config import load
from lumina.data import PackedDataset, prepare
from lumina.data.preparing.preparation import open_cached
from tests.runs import Runs, State, differing, final, steps
from tests.runs.record_run_0_1_0 import STEP, STEPS, this_machine

FIXTURES = Path(__file__).parent / "fixtures/run_0_1_0"


def _enter(rank: int, *, folder: Path) -> None:
    """The run's paths are relative, and its sums those of torch's own operators."""
    os.chdir(folder)
    os.environ["LUMINA_CPU_KERNELS"] = "0"


def recorded(saved: Path) -> State:
    """Weights and moments of a checkpoint of version 0.1.0, read without Lumina: each rank's file holds a range of
    every flat parameter."""
    parts: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for path in saved.glob("rank-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            ranges = json.loads(file.metadata()["ranges"])
            for key in file.keys():  # noqa: SIM118 (no dictionary)
                kind, _, name = key.partition("/")
                if name in ranges:
                    start, length = ranges[name]
                    parts.setdefault((kind, name), {})[start] = file.get_tensor(key)
                    assert file.get_tensor(key).numel() == length
    return {key: torch.cat([found[start] for start in sorted(found)]) for key, found in parts.items()}


@pytest.fixture
def old(request: pytest.FixtureRequest, place: Path) -> Path:
    """A copy of a fixture, which a test may go on with."""
    return Path(shutil.copytree(FIXTURES / request.param, place / request.param))


@pytest.mark.parametrize(
    ("old", "world"), [("first", 1), ("last", 2), pytest.param("first", 2, marks=pytest.mark.long)], indirect=["old"]
)
def test_it_goes_on_to_the_same_end(old: Path, world: int, runs: Runs) -> None:
    made_on = 2 if old.name == "last" else 1
    job = runs.start(["--config", "run/config.yaml", "--resume", "auto"], world, partial(_enter, folder=old))
    assert job.wait() == [0] * world, job.stderr()

    found, expected = final(old / "run", STEPS), recorded(old / "end")
    assert found.keys() == expected.keys()
    if world == made_on and this_machine() == json.loads((old / "machine.json").read_text()):
        assert differing(found, expected) == []
    for key, value in expected.items():
        torch.testing.assert_close(found[key].view_as(value), value, rtol=1e-4, atol=1e-6, msg=str(key))

    assert [record["step"] for record in steps(old / "run") if record["applied"]] == [
        step for step in range(1, STEPS + 1) if step not in (12, 13, 14)
    ]
    assert f"step {STEP}" in job.stdout() + job.stderr()


@pytest.mark.parametrize("old", ["first", "last"], indirect=True)
def test_its_settings_are_read_by_todays_names(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load(str(old / "run/config.yaml"))
    assert (config.on_spike, config.on_oom, config.on_corrupt_sample) == ("skip", "halve_micro_batch", "zero_weight")
    assert config.disabled_rules == ["plateau"]
    (line,) = [record.getMessage() for record in caplog.records if "answer_spike" in record.getMessage()]
    assert "answer_spike is on_spike" in line


@pytest.mark.parametrize("old", ["last"], indirect=True)
def test_its_data_would_be_prepared_alike(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples made anew are those of the cache that it left."""
    monkeypatch.chdir(old)
    config = load("run/config.yaml")
    shutil.move("cache", "set-aside")
    (folder,) = Path("set-aside").iterdir()
    kept = open_cached(folder, json.loads((folder / "meta.json").read_text())["fingerprint"])
    assert kept is not None
    as_then = config.model_copy(update={"overlong_context": 0.0})
    anew = prepare(["train.jsonl"], as_then, open_tokenizer(config.tokenizer))
    assert kept.fingerprint != anew.fingerprint
    assert kept.num_samples == anew.num_samples == 42
    teaching = [documents(dataset) for dataset in (kept, anew)]
    assert len(teaching[0]) == len(teaching[1]) == 47
    for one, other in zip(*teaching, strict=True):
        assert all(np.array_equal(first, second) for first, second in zip(one, other, strict=True))


def documents(dataset: PackedDataset) -> list[list[np.ndarray]]:
    """Tokens, targets, weights and positions of each document that teaches something: version 0.1.0 had others too."""
    batch = dataset.batch(range(dataset.num_samples))
    ends = batch.cu_seqlens_D[1:-1]
    arrays = (batch.ids_T, batch.targets_T, batch.weights_T, batch.positions_T)
    split = zip(*(np.split(np.asarray(array), ends) for array in arrays), strict=True)
    return [list(document) for document in split if document[2].any()]
