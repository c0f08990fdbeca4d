"""Loading: the steps' true token counts, any world size, any start, errors that arrive and threads that end."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lumina.config import ROW_TILE
from lumina.data import GlobalOrder, Loader, PackedDataset, Part, StepData, prepare
from lumina.data.loading import tensors
from lumina.data.loading.tensors import TorchBatch
from tests.data.helpers import TOKENIZER, Settings, chat, write_jsonl


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("loader")
    lines = [chat("word " * (1 + i % 11), "reply " * (1 + i % 13)) for i in range(120)]
    return prepare([write_jsonl(folder / "in.jsonl", lines)], Settings(), TOKENIZER)


def load(
    dataset: PackedDataset, rank: int, world: int, micro: int, start: int = 0, stop: int = 20, **more: Any
) -> list[StepData]:
    order = GlobalOrder(dataset.num_samples, 6, seed=3, fingerprint=dataset.fingerprint)
    return list(
        Loader(dataset, order, rank=rank, world=world, micro_batch_size=micro, start_step=start, stop_step=stop, **more)
    )


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 6), (2, 1), (2, 2), (3, 4), (8, 1)])
def test_every_world_sees_the_same_tokens_each_step(dataset: PackedDataset, world: int, micro: int) -> None:
    whole = load(dataset, 0, 1, 6)
    ranks = [load(dataset, rank, world, micro) for rank in range(world)]
    for reference, *shares in zip(whole, *ranks, strict=True):
        (full,) = reference.micro_batches
        batches = [batch for share in shares for batch in share.micro_batches]
        supervised = np.concatenate([batch.targets_T[batch.weights_T > 0] for batch in batches])
        assert sorted(supervised.tolist()) == sorted(full.targets_T[full.weights_T > 0].tolist())
        assert {share.supervised_tokens for share in shares} == {float(len(supervised))}
        assert sum(int((batch.ids_T != TOKENIZER.pad_id).sum()) for batch in batches) == reference.tokens


def test_resuming_is_a_step_number(dataset: PackedDataset) -> None:
    through, resumed = load(dataset, 0, 2, 1), load(dataset, 0, 2, 1, start=13)
    for one, other in zip(through[13:], resumed, strict=True):
        assert (one.step, one.epoch, one.batch_in_epoch) == (other.step, other.epoch, other.batch_in_epoch)
        assert np.array_equal(one.samples, other.samples)
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert np.array_equal(a.ids_T, b.ids_T)


def test_ranks_that_share_rows_have_the_same_and_count_it_once(dataset: PackedDataset) -> None:
    order = GlobalOrder(dataset.num_samples, 6, seed=3, fingerprint=dataset.fingerprint)

    def part(index: int) -> StepData:
        loader = Loader(
            dataset, order, rank=1, world=2, micro_batch_size=2, start_step=0, stop_step=1, part=Part(index, 2)
        )
        (made,) = loader
        return made

    (alone,) = load(dataset, 1, 2, 2, stop=1)
    first, second = part(0), part(1)
    assert np.array_equal(first.own_samples, alone.own_samples)
    assert len(second.own_samples) == 0
    for one in (first, second):
        assert (one.supervised_tokens, one.tokens) == (alone.supervised_tokens, alone.tokens)
    assert len(first.micro_batches) == len(second.micro_batches) == len(alone.micro_batches) > 0
    for one, other, whole in zip(first.micro_batches, second.micro_batches, alone.micro_batches, strict=True):
        assert np.array_equal(np.concatenate((one.ids_T, other.ids_T)), whole.ids_T)
        assert len(other.ids_T) <= len(one.ids_T) <= -(-len(whole.ids_T) // 2) + ROW_TILE
        ids = torch.cat((one.torch().ids_T, other.torch().ids_T))
        assert ids[: len(whole.ids_T)].tolist() == whole.ids_T.tolist(), "made ahead, of its part"


def test_ranks_that_share_rows_replace_the_same_samples(dataset: PackedDataset, tmp_path: Path) -> None:
    """A sample is replaced for all of them wherever in the row its damage lies: here a token outside the vocabulary."""
    order = GlobalOrder(dataset.num_samples, 12, seed=3, fingerprint=dataset.fingerprint)
    wanted = order.indices(0)[[1, 4, 11]].tolist()
    damaged = PackedDataset(shutil.copytree(dataset.folder, tmp_path / "damaged"), dataset.meta)
    for sample in wanted:
        stored = dataset.chunks_of(sample)[-1].ids
        (path,) = [path for path in damaged.folder.glob("*.arrow") if stored.tobytes() in path.read_bytes()]
        spoilt = stored.copy()
        spoilt[-1] = 1 << 30
        path.write_bytes(path.read_bytes().replace(stored.tobytes(), spoilt.tobytes(), 1))

    def load_part(part: Part) -> StepData:
        loader = Loader(
            damaged,
            order,
            rank=0,
            world=1,
            micro_batch_size=4,
            start_step=0,
            stop_step=1,
            replace_corrupt=True,
            vocab_size=TOKENIZER.vocab_size,
            part=part,
        )
        (made,) = loader
        return made

    whole, parts = load_part(Part()), [load_part(Part(index, 3)) for index in range(3)]
    assert whole.corrupt == parts[0].corrupt == wanted
    for one, *shares in zip(whole.micro_batches, *(part.micro_batches for part in parts), strict=True):
        assert np.concatenate([share.ids_T for share in shares]).tolist() == one.ids_T.tolist()
        assert all(share.cu_seqlens_D.tolist() == one.cu_seqlens_D.tolist() for share in shares)


def _edit(old: bytes, new: bytes) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        stored = path.read_bytes()
        assert old in stored
        path.write_bytes(stored.replace(old, new))

    return edit


def _without_footer(path: Path) -> None:
    """Zeros in place of what tells where the batches are; its length stays, in the last ten bytes."""
    stored = path.read_bytes()
    length = int.from_bytes(stored[-10:-6], "little")
    path.write_bytes(stored[: -10 - length] + bytes(length) + stored[-10:])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        _without_footer,
        _edit(b"\x03\0\0\0ids\0", b"\x03\0\0\0idz\0"),
        _edit(b"\x04\0\0\0mask\0", b"\x04\0\0\0ma\xff\xfe\0"),
    ],
    ids=["empty", "zeros", "cut off", "footer", "a column's name", "no text"],
)
def test_what_a_damaged_file_raises_makes_its_samples_corrupt(
    damage: Callable[[Path], object], dataset: PackedDataset, tmp_path: Path
) -> None:
    damaged = PackedDataset(shutil.copytree(dataset.folder, tmp_path / "damaged"), dataset.meta)
    (shard,) = dataset.meta["shards"]
    damage(damaged.folder / shard["file"])
    for part in (Part(), Part(0, 2)):
        (made,) = load(damaged, 0, 1, 6, stop=1, replace_corrupt=True, part=part)
        assert sorted(made.corrupt) == sorted(made.samples.tolist())


def test_a_read_error_makes_samples_corrupt_but_ends_ranks_that_share_rows(
    dataset: PackedDataset, tmp_path: Path
) -> None:
    """One of them alone may meet it: its row would have another length than the others'."""
    damaged = PackedDataset(shutil.copytree(dataset.folder, tmp_path / "damaged"), dataset.meta)
    (damaged.folder / dataset.meta["shards"][0]["file"]).unlink()
    (made,) = load(damaged, 0, 1, 6, stop=1, replace_corrupt=True)
    assert sorted(made.corrupt) == sorted(made.samples.tolist())
    with pytest.raises(OSError, match=r"sample \d+ cannot be read on this rank, and .*\.arrow"):
        load(damaged, 0, 1, 6, stop=1, replace_corrupt=True, part=Part(1, 2))


def test_a_programs_error_is_no_damage(dataset: PackedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: PackedDataset, indices: object) -> object:
        raise TypeError("wrong program")

    monkeypatch.setattr(PackedDataset, "batch", wrong)
    with pytest.raises(TypeError, match="wrong program"):
        load(dataset, 0, 1, 6, replace_corrupt=True)


def test_leaving_early_ends_the_thread(dataset: PackedDataset) -> None:
    order = GlobalOrder(dataset.num_samples, 6, seed=3, fingerprint=dataset.fingerprint)
    loader = Loader(dataset, order, rank=0, world=1, micro_batch_size=2, start_step=0, stop_step=10**9)
    steps, before = iter(loader), set(threading.enumerate())
    assert next(steps).step == 0
    (own,) = (thread for thread in threading.enumerate() if thread.name == "lumina-loader" and thread not in before)
    steps.close()  # type: ignore[attr-defined]
    assert not own.is_alive()


def test_an_error_while_loading_reaches_the_loop(dataset: PackedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    real = PackedDataset.batch

    def fails_later(self: PackedDataset, indices: object) -> object:
        if threading.current_thread().name == "lumina-loader" and next(calls) == 4:
            raise OSError("disk gone")
        return real(self, indices)  # type: ignore[arg-type]

    calls = iter(range(100))
    monkeypatch.setattr(PackedDataset, "batch", fails_later)
    with pytest.raises(OSError, match="disk gone"):
        load(dataset, 0, 1, 6)


def test_batches_are_ready_for_the_model_and_shipped_by_the_thread_that_makes_them(
    dataset: PackedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped: list[tuple[str, int]] = []

    class Ship:
        def __init__(self, device: torch.device) -> None:
            assert device == torch.device("cuda:1")

        def __call__(self, batch: TorchBatch) -> TorchBatch:
            shipped.append((threading.current_thread().name, len(batch.ids_T)))
            return batch

    monkeypatch.setattr(tensors, "Shipper", Ship)
    order = GlobalOrder(dataset.num_samples, 6, 3, dataset.fingerprint)
    for device in ("cuda:1", "cpu"):
        shipped.clear()
        loader = Loader(
            dataset,
            order,
            rank=0,
            world=1,
            micro_batch_size=2,
            start_step=0,
            stop_step=2,
            device=torch.device(device),
        )
        batches = [batch for step in loader for batch in step.micro_batches]
        assert all(batch.torch() is batch.made for batch in batches), "made once, ahead of the step"
        assert [len(batch.torch().ids_T) % 64 for batch in batches] == [0] * len(batches)
        sent = [("lumina-loader", len(batch.torch().ids_T)) for batch in batches]
        assert shipped == (sent if device == "cuda:1" else [])
