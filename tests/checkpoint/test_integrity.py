"""Checkpoints exist whole or not at all: damage is named, and the one before is used (law 5)."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lumina import checkpoint
from lumina.checkpoint import MANIFEST, TRAINER, TrainerState, integrity_error, latest_valid
from lumina.config import UserError
from lumina.files import file_sha256
from lumina.train.deepspeed import Engine
from lumina.train.saving import snapshot
from tests.train.tiny_engines import make_engine, save, train_step


@pytest.fixture(scope="module")
def engine() -> Engine:
    made = make_engine(0)
    train_step(made, 0)
    return made


@pytest.fixture(scope="module")
def original(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    for step in (5, 10):
        save(folder, engine, TrainerState(step=step, best_loss=1.5, global_batch_size=4, data_fingerprint="abc"))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """Two sound checkpoints, of step 5 and 10."""
    return Path(shutil.copytree(original, tmp_path / "checkpoints"))


def newest(folder: Path) -> Path:
    return folder / "step-00000010"


# --- Writing ---


def test_what_a_checkpoint_holds(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000005", "step-00000010"]
    files = sorted(p.name for p in newest(folder).iterdir())
    assert files == [MANIFEST, "rank-00000-of-00001.safetensors", TRAINER]
    manifest = json.loads((newest(folder) / MANIFEST).read_text())
    assert manifest["format"] == 1
    assert sorted(f["name"] for f in manifest["files"]) == files[1:]
    assert integrity_error(newest(folder)) is None


def test_progress_comes_back(folder: Path) -> None:
    progress, trainer = checkpoint.read_trainer_state(newest(folder))
    assert progress == TrainerState(step=10, best_loss=1.5, global_batch_size=4, data_fingerprint="abc")
    assert trainer["optimizer_step"] == 1


def test_saving_over_a_damaged_one(folder: Path, engine: Engine) -> None:
    """A run that resumed from before a damaged checkpoint comes by its step again."""
    (newest(folder) / TRAINER).write_text("torn")
    (folder / ".step-00000010.partial").mkdir()
    (folder / ".step-00000010.partial" / "rank-00001-of-00002.safetensors").write_bytes(b"from an earlier life")
    assert save(folder, engine, TrainerState(step=10)) == newest(folder)
    assert integrity_error(newest(folder)) is None
    assert len(list(newest(folder).iterdir())) == 3


def test_nothing_in_it_is_pickle(folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading one cannot run code: the files are JSON and safetensors, and reading them unpickles nothing."""
    from safetensors import safe_open

    for path in newest(folder).iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.suffix == ".safetensors"
            with safe_open(path, framework="pt") as file:
                assert file.keys()
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)
    shapes = {name: p.shape for name, p in engine.model.named_parameters()}
    weights = dict(checkpoint.iter_weights(newest(folder), shapes))
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(weights[name], parameter.detach())
    snapshot.load_checkpoint(newest(folder), engine, checkpoint.read_trainer_state(newest(folder))[1])


# --- Damage ---


def falls_back(folder: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """The newest is found damaged, by the file's name; the one before is chosen, with a warning that says so."""
    found = integrity_error(newest(folder))
    assert found is not None
    assert name in found
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lumina"):
        assert latest_valid(checkpoint.list_checkpoints(folder)) == folder / "step-00000005"
    assert len(caplog.records) == 1
    assert "step-00000010" in caplog.text
    assert name in caplog.text


def test_a_flipped_byte_in_each_file(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the start, the middle and the end of every file in turn."""
    for path in sorted(newest(folder).iterdir()):
        whole = path.read_bytes()
        for place in (0, len(whole) // 3, len(whole) // 2, len(whole) - 1):
            spoiled = bytearray(whole)
            spoiled[place] ^= 0x55
            path.write_bytes(spoiled)
            # A manifest whose hash of another file is spoiled names that file.
            name = path.name if path.name != MANIFEST else ""
            falls_back(folder, caplog, name)
        path.write_bytes(whole)
    assert latest_valid(checkpoint.list_checkpoints(folder)) == newest(folder)


def test_every_byte_of_the_manifest(folder: Path) -> None:
    """No single flipped bit of the manifest goes unseen, unless it says the same."""
    path = newest(folder) / MANIFEST
    whole = path.read_bytes()
    meaning = json.loads(whole)
    for place in range(len(whole)):
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << (place % 7)
        path.write_bytes(spoiled)
        try:
            harmless = json.loads(spoiled) == meaning
        except ValueError:
            harmless = False
        found = integrity_error(newest(folder))
        assert (found is None) == harmless, (place, bytes(spoiled[place - 20 : place + 20]))


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize("name", [TRAINER, "rank-00000-of-00001.safetensors", MANIFEST])
@pytest.mark.parametrize("harm", [remove, truncate, empty])
def test_missing_and_torn_files(
    name: str, harm: Callable[[Path], None], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harm(newest(folder) / name)
    falls_back(folder, caplog, name)


@pytest.mark.parametrize("name", [TRAINER, "rank-00000-of-00001.safetensors"])
def test_bytes_too_many(name: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    lengthen(newest(folder) / name)
    falls_back(folder, caplog, name)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"files": None},
        {"files": [{}]},
        {"files": [{"name": TRAINER, "bytes": "many", "sha256": "0"}]},
        {"files": "rank"},
        {"files": []},
    ],
    ids=str,
)
def test_a_manifest_that_says_something_else(
    change: dict[str, Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = newest(folder) / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    falls_back(folder, caplog, MANIFEST)


@pytest.mark.parametrize("text", ["[]", "null", "7", '"manifest"'])
def test_a_manifest_that_is_no_object(text: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (newest(folder) / MANIFEST).write_text(text)
    falls_back(folder, caplog, MANIFEST)


@pytest.mark.parametrize("absolute", [True, False])
def test_names_that_lead_outside(absolute: bool, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A manifest may not vouch for a file elsewhere, even one that exists with the right hash."""
    outside = folder / "secret"
    outside.write_bytes(b"elsewhere")
    path = newest(folder) / MANIFEST
    manifest = json.loads(path.read_text())
    name = str(outside) if absolute else "../secret"
    manifest["files"].append({"name": name, "bytes": 9, "sha256": file_sha256(outside)})
    path.write_text(json.dumps(manifest))
    falls_back(folder, caplog, "secret")


def test_none_is_sound(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in checkpoint.list_checkpoints(folder):
        (path / TRAINER).unlink()
    assert latest_valid(checkpoint.list_checkpoints(folder)) is None
    assert len(caplog.records) == 2
    assert latest_valid([]) is None


# --- Finding ---


def test_only_named_folders_count(folder: Path) -> None:
    for name in (".step-00000020.partial", ".step-00000005.doomed", "step-20", "step-0000002x", "step-00000020.old"):
        shutil.copytree(newest(folder), folder / name)
    (folder / "step-00000030").write_text("a file")
    assert [p.name for p in checkpoint.list_checkpoints(folder)] == ["step-00000010", "step-00000005"]
    assert checkpoint.list_checkpoints(folder / "nowhere") == []


def test_newest_is_by_number(folder: Path) -> None:
    """Not by name: beyond 99,999,999 steps a name grows longer."""
    for step in (99_999_999, 100_000_000):
        (folder / checkpoint.name_of(step)).mkdir()
    found = [p.name for p in checkpoint.list_checkpoints(folder)]
    assert found[:2] == ["step-100000000", "step-99999999"]
    assert [p.name for p in checkpoint.candidates(folder / "step-100000000")] == found
    assert [p.name for p in checkpoint.candidates(folder / "step-99999999")] == found[1:]


def test_what_a_users_path_means(folder: Path) -> None:
    both = [newest(folder), folder / "step-00000005"]
    assert checkpoint.candidates(folder.parent) == both
    assert checkpoint.candidates(str(folder)) == both
    assert checkpoint.candidates(newest(folder)) == both
    assert checkpoint.candidates(folder / "step-00000005") == both[1:]
    for nothing in (folder / "step-00000007", folder.parent / "typo"):
        with pytest.raises(UserError, match="no checkpoint at"):
            checkpoint.candidates(nothing)


# --- Retention ---


def fill(folder: Path, steps: range) -> None:
    for step in steps:
        (folder / checkpoint.name_of(step)).mkdir(parents=True)
        (folder / checkpoint.name_of(step) / "file").write_text("x")


@pytest.mark.parametrize(("best", "kept"), [(None, [8, 9]), (3, [3, 8, 9]), (9, [8, 9]), (77, [8, 9])])
def test_the_last_and_the_best_are_kept(best: int | None, kept: list[int], tmp_path: Path) -> None:
    fill(tmp_path, range(1, 10))
    if best is not None:
        checkpoint.record_best(tmp_path, best, 1.0)
    checkpoint.prune(tmp_path, 2)
    assert [int(p.name.split("-")[1]) for p in checkpoint.list_checkpoints(tmp_path)] == kept[::-1]
    assert checkpoint.best_step(tmp_path) == best
    checkpoint.prune(tmp_path, 2)
    assert len(checkpoint.list_checkpoints(tmp_path)) == len(kept)


def test_later_checkpoints_of_an_earlier_start_count_for_none(tmp_path: Path) -> None:
    """Resumed from step 3 because steps 6 and 9 are damaged: with `keep_last: 1`, the save of step 4 must stay."""
    fill(tmp_path, range(3, 10, 3))
    fill(tmp_path, range(4, 5))
    assert [path.name for path in checkpoint.prune(tmp_path, 1, step=4)] == ["step-00000003"]
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [9, 6, 4]


def test_leftovers_of_a_kill_are_cleared(tmp_path: Path) -> None:
    """By the next start; a prune leaves unfinished saves alone, which may be another start's."""
    fill(tmp_path, range(1, 3))
    for name in (".step-00000003.0a-1.partial", ".step-00000001.doomed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank").write_text("x")
    (tmp_path / ".best.json.partial").write_text("{")
    checkpoint.prune(tmp_path, 5)
    assert (tmp_path / ".step-00000003.0a-1.partial" / "rank").exists()
    checkpoint.clear_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(
    ("last", "every", "best", "kept"),
    [(2, None, None, {8, 9}), (1, 4, None, {4, 8, 9}), (1, None, 3, {3, 9}), (1, 5, 3, {3, 5, 9})],
)
def test_what_a_retention_keeps(last: int, every: int | None, best: int | None, kept: set[int]) -> None:
    assert checkpoint.Retention(last, every).kept(list(range(1, 10)), best) == kept
    assert checkpoint.Retention(last, every, best=False).kept(list(range(1, 10)), best) == kept - ({3} & {best})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"loss": 1}', '{"step": "x"}', '{"step": null}'])
def test_a_spoiled_note_of_the_best_is_no_error(text: str, tmp_path: Path) -> None:
    (tmp_path / checkpoint.BEST).write_text(text)
    assert checkpoint.best_step(tmp_path) is None
