"""Attacks on a checkpoint's folder: (what is changed, what must be said), with every hash right again afterwards.

An ordinary module, so that it also runs under `python -O`, where pytest cannot: `main` takes a folder to work in.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lumina.checkpoint import CheckpointReader, Snapshot, integrity_error, manifest_entry, write_checkpoint
from lumina.config import UserError

WEIGHTS = torch.arange(10.0)


def sound(folder: Path) -> Path:
    """A checkpoint of two ranks: ten elements of one parameter, with a moment."""
    parts = ((0, 4), (4, 6))
    shards = []
    for start, size in parts:
        own = WEIGHTS[start : start + size]
        shards.append(Snapshot(3, {f"{key}/w": [own.clone()] for key in ("master", "exp_avg")}, {"w": [start, size]}))
    return write_checkpoint(folder, shards, 2)


def read(saved: Path) -> torch.Tensor:
    found = torch.full((10,), torch.nan)
    CheckpointReader(saved).read("master", "w", 0, found)
    return found


# --- What is changed ---


def rank_file(saved: Path, rank: int, start: int, size: int, **more: Any) -> None:
    """Another file of a rank."""
    tensors = more.pop("tensors", {f"{key}/w": torch.full((size,), 99.0) for key in ("master", "exp_avg")})
    metadata = more.pop("metadata", {"ranges": json.dumps(more.pop("ranges", {"w": [start, size]}))})
    save_file(tensors, saved / f"rank-{rank:05d}-of-00002.safetensors", metadata=metadata)


def names(saved: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change the manifest's list of files."""
    manifest = json.loads((saved / "manifest.json").read_text())
    change(manifest["files"])
    (saved / "manifest.json").write_text(json.dumps(manifest))


def hashed(saved: Path) -> None:
    """Every hash and size as the files are now."""

    def update(files: list[dict[str, Any]]) -> None:
        for one in files:
            if "\0" not in one["name"] and (saved / one["name"]).is_file():
                one.update({**manifest_entry(saved / one["name"]), "name": one["name"]})

    names(saved, update)


def path_out(saved: Path) -> None:
    rank_file(saved.parent, 0, 0, 4)
    names(saved, lambda files: files[0].update(name="../rank-00000-of-00002.safetensors"))


def garbage(saved: Path) -> None:
    (saved / "rank-00001-of-00002.safetensors").write_bytes(b"\xff" * 64)


def unlisted(name: str) -> Callable[[Path], None]:
    def change(saved: Path) -> None:
        save_file({"master/w": torch.full((10,), 99.0)}, saved / name, metadata={"ranges": '{"w": [0, 10]}'})

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda saved: names(saved, lambda files: files.remove(next(one for one in files if one["name"] == name)))


# What is changed -> what the refusal says; None: it is ignored, and the weights are those of the listed files.
ATTACKS: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "an unlisted file of a rank": (unlisted("rank-00002-of-00003.safetensors"), None),
    "an unlisted file of the same rank": (unlisted("rank-00000-of-00001.safetensors"), None),
    "an unlisted file before the others": (unlisted("rank-00000-of-00000.safetensors"), None),
    "unlisted garbage": (lambda saved: (saved / "rank-9.safetensors").write_bytes(b"x") and None, None),
    "a rank missing from the list": (without("rank-00001-of-00002.safetensors"), "names rank-00000-of-00002"),
    "no rank in the list": (
        lambda saved: names(saved, lambda files: files.__delitem__(slice(0, 2))),
        "does not name trainer.json and the files of the ranks",
    ),
    "a rank listed twice": (lambda saved: names(saved, lambda files: files.append(files[0])), "among 3 files of ranks"),
    "a path out of the folder": (path_out, "is no file of the checkpoint"),
    "a name with NUL": (lambda saved: names(saved, lambda files: files[0].update(name="rank-\0")), "is no file"),
    "a list that is none": (lambda saved: (saved / "manifest.json").write_text("[]") and None, "cannot be read"),
    "a range held twice": (lambda saved: rank_file(saved, 1, 3, 7), "element 3 of w is held twice"),
    "a range left out": (lambda saved: rank_file(saved, 1, 5, 5), "element 4 of w is not held"),
    "an end left out": (lambda saved: rank_file(saved, 1, 4, 5), "covers 9 of 10 elements of master/w"),
    "the same range for other elements": (lambda saved: rank_file(saved, 1, 0, 6), "element 0 of w is held twice"),
    "a negative range": (lambda saved: rank_file(saved, 1, -6, 6), "a range that is none"),
    "fewer elements than it says": (
        lambda saved: rank_file(saved, 1, 4, 6, tensors={"master/w": torch.zeros(2)}),
        "master/w",
    ),
    "a matrix": (lambda saved: rank_file(saved, 1, 4, 6, tensors={"master/w": torch.zeros(6, 6)}), "master/w"),
    "no tensor": (lambda saved: rank_file(saved, 1, 4, 6, tensors={"other/w": torch.zeros(6)}), "master/w"),
    "no ranges": (lambda saved: rank_file(saved, 1, 4, 6, metadata={}), "does not say what it holds"),
    "ranges that are none": (lambda saved: rank_file(saved, 1, 4, 6, ranges=["w"]), "does not say what it holds"),
    "ranges of words": (lambda saved: rank_file(saved, 1, 4, 6, ranges={"w": ["a", 1]}), "does not say what it holds"),
    "ranges nested deep": (
        lambda saved: rank_file(saved, 1, 4, 6, metadata={"ranges": "[" * 10**5}),
        "does not say what it holds",
    ),
    "no safetensors": (garbage, "cannot be read"),
}


def outcome(name: str, folder: Path) -> str | None:
    """What is wrong with the outcome of an attack; None when it is what must happen."""
    change, expected = ATTACKS[name]
    saved = sound(folder)
    change(saved)
    if name != "a list that is none":
        hashed(saved)
    said = integrity_error(saved)
    if said is None:
        try:
            found = read(saved)
        except UserError as error:
            said = str(error)
    if expected is None:
        if said is not None:
            return f"refused: {said}"
        return None if torch.equal(found, WEIGHTS) else f"other weights: {found.tolist()}"
    if said is None:
        return f"taken: {found.tolist()}"
    return None if expected in said else f"refused otherwise: {said}"


def main() -> None:
    """All of them, in folders under the one that the command line names."""
    wrong = {}
    for number, name in enumerate(ATTACKS):
        folder = Path(sys.argv[1]) / str(number)
        found = outcome(name, folder)
        if found is not None:
            wrong[name] = found
    print(json.dumps(wrong))
