"""What the model is given of a batch: whole tiles of rows, and everything that a device would be asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lumina.config import ROW_TILE, round_up
from lumina.data import Batch, Part
from lumina.data.loading import tensors
from lumina.data.loading.dataset import join
from lumina.data.loading.part import WHOLE
from lumina.data.loading.tensors import TorchBatch


def batch(lengths: list[int], supervised: float = 0.5, seed: int = 0, part: Part = WHOLE) -> Batch:
    draw = np.random.default_rng(seed)
    ids = [draw.integers(1, 100, length).astype(np.int32) for length in lengths]
    return join(ids, [(draw.random(length) < supervised).astype(np.uint8) for length in lengths], part)


@pytest.mark.parametrize("lengths", [[40, 7, 33], [64, 64], [1], [100, 60, 32, 3], [5, 300], [1] * 70, [128, 1, 127]])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("pairs", [False, True])
def test_parts_make_up_the_row(lengths: list[int], count: int, pairs: bool) -> None:
    whole, parts = batch(lengths), []
    if pairs:
        whole.pairs_P3 = np.ones((max(1, len(lengths) // 2), 3), dtype=np.float32)
    for index in range(count):
        own = batch(lengths, part=Part(index, count))
        own.pairs_P3 = whole.pairs_P3
        parts.append(own.torch())
        for name in ("ids_T", "targets_T", "weights_T", "positions_T"):
            start = index * len(parts[0].ids_T)
            wanted = getattr(whole, name)[start : start + len(parts[0].ids_T)]
            assert getattr(own, name).tolist() == wanted.tolist(), "held of the row: the part alone"
    tokens, length = sum(lengths), len(parts[0].ids_T)
    assert length == -(-tokens // (ROW_TILE * count)) * ROW_TILE
    assert torch.cat([part.ids_T for part in parts])[:tokens].tolist() == whole.ids_T.tolist()
    assert torch.cat([part.positions_T for part in parts])[:tokens].tolist() == whole.positions_T.tolist()
    for part in parts:
        assert part.bounds == tuple(part.cu_seqlens_D.tolist())
        assert part.bounds[: len(lengths) + 1] == tuple(whole.cu_seqlens_D.tolist())
        assert part.bounds[-1] == count * length
        assert part.max_seqlen == max(b - a for a, b in pairwise(part.bounds))
        assert len(part.supervised_N) % ROW_TILE == 0
        assert part.supervised_N.numel() == 0 or int(part.supervised_N.max()) < length
    learned = []
    for index, part in enumerate(parts):
        for at, target, weight in zip(part.supervised_N, part.targets_N, part.weights_N, strict=True):
            if weight:
                learned.append((index * length + int(at), int(target), float(weight)))
    expected = np.flatnonzero(whole.weights_T)
    assert learned == [(at, whole.targets_T[at], 1.0) for at in expected.tolist()]
    assert sum(part.units for part in parts) == (len(whole.pairs_P3) if whole.pairs_P3 is not None else len(expected))
    if pairs:
        for index, part in enumerate(parts):
            assert part.documents_N is not None
            for at, document in zip(part.supervised_N.tolist(), part.documents_N.tolist(), strict=True):
                assert part.bounds[document] <= index * length + at < part.bounds[document + 1]


def test_whole_tiles() -> None:
    assert [round_up(n) for n in (0, 1, 63, 64, 65)] == [0, 64, 64, 64, 128]


@pytest.mark.parametrize("lengths", [[40, 7, 33], [64], [1], [100, 60, 32], [5, 300]])
@pytest.mark.parametrize("supervised", [0.0, 0.02, 0.5, 1.0])
def test_nothing_is_lost_and_what_is_added_weighs_nothing(lengths: list[int], supervised: float) -> None:
    given = batch(lengths, supervised)
    found, tokens = given.torch(), sum(lengths)
    assert len(found.ids_T) == len(found.positions_T) == round_up(tokens)
    assert found.ids_T[:tokens].tolist() == given.ids_T.tolist()
    assert found.positions_T[:tokens].tolist() == given.positions_T.tolist()
    # The tokens that fill a tile are a document of their own, which nobody attends to and nothing is supervised in.
    edges = given.cu_seqlens_D.tolist() + [round_up(tokens)] * (tokens % ROW_TILE != 0)
    assert found.cu_seqlens_D.tolist() == list(found.bounds) == edges
    assert found.cu_seqlens_D.dtype is torch.int32
    assert found.max_seqlen == max(end - start for start, end in pairwise(edges))
    wanted = np.flatnonzero(given.weights_T)
    count = len(wanted)
    assert len(found.supervised_N) == len(found.targets_N) == len(found.weights_N) == round_up(count)
    assert found.supervised_N[:count].tolist() == wanted.tolist()
    assert found.targets_N[:count].tolist() == given.targets_T[wanted].tolist()
    assert found.weights_N[:count].tolist() == given.weights_T[wanted].tolist()
    assert not found.weights_N[count:].any()
    assert found.supervised_N[count:].tolist() == [0] * (round_up(count) - count)
    assert found.units == count
    assert {found.ids_T.dtype, found.positions_T.dtype, found.supervised_N.dtype, found.targets_N.dtype} == {
        torch.int64
    }
    assert found.weights_N.dtype is torch.float32


def test_pairs_know_the_document_of_each_supervised_token() -> None:
    given = batch([9, 14, 20, 11], 0.7)
    given.pairs_P3 = np.array([[1.0, 1.0, -9.0], [0.5, 0.0, -8.0]], dtype=np.float32)
    found = given.torch()
    assert found.documents_N is not None
    assert found.units == 1.0
    bounds = given.cu_seqlens_D
    for where, document, weight in zip(found.supervised_N, found.documents_N, found.weights_N, strict=True):
        assert bounds[document] <= where < bounds[document + 1]
        assert weight in (0, 1)
    assert int(found.weights_N.sum()) == int(given.weights_T.sum())


class Copies(TorchDispatchMode):
    """Counts copies to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if "_to_copy" in str(func):
            self.found.append((args[0].nbytes, bool(options.get("non_blocking"))))
        return func(*args, **options)


def pairs() -> Batch:
    given = batch([9, 14, 20, 11], 0.7)
    given.pairs_P3 = np.array([[1.0, 1.0, -9.0], [0.5, 0.0, -8.0]], dtype=np.float32)
    return given


@pytest.mark.parametrize("of", [batch([40, 7, 33]), batch([3], 0.0), pairs()])
def test_a_batch_goes_to_a_device_as_one_copy_that_the_host_does_not_wait_for(of: Batch) -> None:
    given = of.torch()
    with Copies() as copies:
        there = given.to(torch.device("meta"))
    ((size, non_blocking),) = copies.found
    assert non_blocking
    assert size >= sum(value.nbytes for value in given if isinstance(value, torch.Tensor))
    for name, value in given._asdict().items():
        moved = getattr(there, name)
        if isinstance(value, torch.Tensor):
            assert (moved.device.type, moved.dtype, moved.shape) == ("meta", value.dtype, value.shape), name
        else:
            assert moved == value, name
    assert there.to(torch.device("meta")) is there
    assert given.to(torch.device("cpu")) is given, "where it is already nothing is copied"


@pytest.mark.parametrize("of", [batch([40, 7, 33]), batch([3], 0.0), pairs()])
def test_the_block_holds_every_array(of: Batch) -> None:
    given = of.torch()
    copied = tensors._copied(given, torch.device("cpu"))
    starts = set()
    for name, value in given._asdict().items():
        if isinstance(value, torch.Tensor):
            found = getattr(copied, name)
            assert torch.equal(found, value), name
            assert found.untyped_storage().data_ptr() == copied.ids_T.untyped_storage().data_ptr()
            assert found.storage_offset() * found.element_size() % 64 == 0, "vectorised loads want it aligned"
            starts.add(found.untyped_storage().data_ptr())
    assert len(starts) == 1


class Stream:
    """Stands for a CUDA stream: what is asked of it, in order."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record_event(self) -> str:
        self.log.append(f"{self.name} records")
        return "copied"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch's streams replaced by stand-ins; what they are asked, and copies, in order."""
    log: list[str] = []
    copied = tensors._copied

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield
        log.append(f"off {stream.name}")

    def copy(batch: TorchBatch, device: torch.device) -> TorchBatch:
        log.append("copy")
        return copied(batch, torch.device("cpu"))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(log, "side"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: log.append(f"device {device}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(log, "main"))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: log.append(f"kept for {stream.name}"))
    monkeypatch.setattr(tensors, "_copied", copy)
    return log


def test_the_step_is_ordered_after_its_copy_and_the_host_waits_for_neither(streams: list[str]) -> None:
    device = torch.device("cuda:0")
    shipped = tensors.Shipper(device)(batch([40, 7, 33]).torch())
    assert streams.pop(0) == "device cuda:0", "leaving the stream would go back to the machine's first device"
    assert streams == ["on side", "copy", "side records", "off side"]
    streams.clear()
    ready = shipped.to(device)
    assert streams == ["main waits for copied", "kept for main"]
    assert ready.shipped is None
    assert torch.equal(ready.ids_T, shipped.ids_T)


def test_no_room_on_the_device_is_left_to_the_loop(streams: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(batch: TorchBatch, device: torch.device) -> TorchBatch:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(tensors, "_copied", full)
    given = batch([5]).torch()
    assert tensors.Shipper(torch.device("cuda:0"))(given) is given
