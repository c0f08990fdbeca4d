"""Any range of any parameter, from the files of any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lumina.checkpoint import CheckpointReader, iter_weights, manifest_entry
from lumina.config import UserError

NAMES = {"a.weight": 24, "b": 7}


def values(key: str, name: str) -> torch.Tensor:
    return torch.arange(NAMES[name], dtype=torch.float32) + {"master": 0.0, "exp_avg": 100.0}[key] + 1000 * len(name)


def write(folder: Path, cuts: dict[str, list[int]]) -> Path:
    """Rank r holds elements [cuts[r], cuts[r + 1]) of each parameter; empty ranges are left out, as save does."""
    world = len(cuts["b"]) - 1
    for rank in range(world):
        tensors, ranges = {"rng/cpu": torch.full((4,), rank, dtype=torch.uint8)}, {}
        for name in NAMES:
            start, end = cuts[name][rank], cuts[name][rank + 1]
            if start < end:
                ranges[name] = [start, end - start]
                for key in ("master", "exp_avg"):
                    tensors[f"{key}/{name}"] = values(key, name)[start:end].clone()
        metadata = {"ranges": json.dumps(ranges)}
        save_file(tensors, folder / f"rank-{rank:05d}-of-{world:05d}.safetensors", metadata=metadata)
    (folder / "trainer.json").write_text('{"step": 1}')
    return name_all(folder)


def name_all(folder: Path) -> Path:
    """A manifest of every file that is there."""
    files = [manifest_entry(path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"]
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    return folder


def splits(numel: int, world: int) -> st.SearchStrategy[list[int]]:
    inner = st.lists(st.integers(0, numel), min_size=world - 1, max_size=world - 1)
    return inner.map(lambda cuts: [0, *sorted(cuts), numel])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_range_from_any_split(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 6))
    cuts = {name: data.draw(splits(numel, world)) for name, numel in NAMES.items()}
    reader = CheckpointReader(write(tmp_path_factory.mktemp("ranks"), cuts))
    assert reader.world == world
    assert reader.keys == ["exp_avg"]
    assert reader.names() == set(NAMES)
    assert [reader.rng(rank)[0].item() for rank in range(world)] == list(range(world))
    for name, numel in NAMES.items():
        assert reader.numel(name) == numel
        start = data.draw(st.integers(0, numel))
        end = data.draw(st.integers(start, numel))
        for key in ("master", "exp_avg"):
            out = torch.full((end - start,), torch.nan)
            reader.read(key, name, start, out)
            assert torch.equal(out, values(key, name)[start:end])


def test_a_gap_is_noticed(tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path, {"a.weight": [0, 12, 24], "b": [0, 3, 7]}))
    out = torch.empty(9)
    with pytest.raises(UserError, match="covers 7 of 9 elements of master/b"):
        reader.read("master", "b", 0, out)


def test_whole_weights(tmp_path: Path) -> None:
    write(tmp_path, {"a.weight": [0, 5, 5, 24], "b": [0, 0, 7, 7]})
    found = dict(iter_weights(tmp_path, {"a.weight": torch.Size([4, 6]), "b": torch.Size([7])}))
    assert torch.equal(found["a.weight"], values("master", "a.weight").view(4, 6))
    assert torch.equal(found["b"], values("master", "b"))


def test_another_models_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.weight": [0, 24], "b": [0, 7]})
    shapes = {"a.weight": torch.Size([24]), "b": torch.Size([7])}
    with pytest.raises(UserError, match="this one also needs c"):
        dict(iter_weights(tmp_path, {**shapes, "c": torch.Size([1])}))
    with pytest.raises(UserError, match="this one does not know b"):
        dict(iter_weights(tmp_path, {"a.weight": torch.Size([24])}))
    with pytest.raises(UserError, match="b has 7 elements, the model has 8"):
        dict(iter_weights(tmp_path, {**shapes, "b": torch.Size([2, 4])}))
