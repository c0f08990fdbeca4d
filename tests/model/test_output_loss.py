"""The fused output loss: exact gradients, the same in one chunk or many, and never a whole table of logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from lumina.config import ROW_TILE, load, output_chunk_bytes
from lumina.model import loss as room
from lumina.model.loss import POSITION_BINS, loss_by_position, output_loss, position_bins, token_losses
from lumina.plan.costs.devices import find_device
from lumina.plan.costs.memory import output_layers_memory
from lumina.plan.costs.setup import Setup
from lumina.plan.costs.speed import STREAM
from tests.model.tiny_models import check_errors, make_model, pack, run


def case(rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=draw).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=draw)
    return hidden, weight, targets, torch.rand(rows, generator=draw) + 0.1


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    losses = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    return (losses * weights.to(losses.dtype)).sum()


def rows_per_chunk(monkeypatch: pytest.MonkeyPatch, rows: int, vocabulary: int, element_size: int) -> None:
    monkeypatch.setattr(room, "CHUNK_BYTES", rows * vocabulary * element_size)


@pytest.mark.parametrize("chunk", [100, 3, 1])
def test_gradients_are_exact(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_per_chunk(monkeypatch, chunk, 11, 8)
    hidden, weight, targets, weights = case(7, 4, 11)
    assert gradcheck(lambda h, w: output_loss(h, w, targets, weights), (hidden, weight), check_undefined_grad=False)


@pytest.mark.parametrize("chunk", [1000, 7])
def test_the_loss_by_position_against_each_document_alone(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the whole table of logits of each document, and a count of the tokens before each target."""
    rows_per_chunk(monkeypatch, chunk, 61, 8)
    model, batch = make_model(dtype=torch.float64).eval(), pack([70, 1, 40, 131, 2])
    expected = torch.zeros(2, POSITION_BINS, dtype=torch.float64)
    with torch.no_grad():
        for document in batch.documents():
            logits = model(document.ids, document.positions)[0]
            for place, (target, weight) in enumerate(zip(document.targets[0], document.weights[0], strict=True)):
                bin = max(k for k in range(POSITION_BINS) if 2**k <= len(document.ids[0, : place + 1]))
                expected[:, bin] += weight.double() * torch.stack(
                    [F.cross_entropy(logits[place], target), torch.ones(())]
                )
        where = batch.weights.flatten().nonzero().flatten()
        where = torch.cat([where, torch.zeros(5, dtype=torch.int64)])  # as the loader fills up whole tiles
        given = batch.targets.flatten()[where], batch.weights.flatten()[where].index_fill(0, torch.arange(-5, 0), 0.0)
        options = {"supervised_N": where, "by_position": True}
        total, *sums = model(*batch[:4], *given, **options)
    assert float(total) == pytest.approx(float(expected[0].sum()), rel=1e-12)
    torch.testing.assert_close(torch.stack(sums).view(2, POSITION_BINS), expected, rtol=1e-12, atol=0)


def test_a_loss_that_is_not_finite_stays_in_its_range() -> None:
    hidden, weight, targets, weights = case(6, 4, 11)
    hidden = hidden.detach().index_fill(0, torch.tensor([5]), torch.nan)
    before = torch.tensor([1, 2, 3, 4, 7, 8])
    _, *sums = loss_by_position(hidden, weight.detach(), targets, weights, before)
    assert torch.stack(sums[:4]).isfinite().tolist() == [True, True, True, False]


def test_ranges_of_positions_to_the_last_token() -> None:
    edges = [2**k + more for k in range(1, 25) for more in (-1, 0, 1)]
    assert position_bins(torch.tensor([1, *edges])).tolist() == [place.bit_length() - 1 for place in (1, *edges)]


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_the_whole_model_are_exact(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through every layer, packed, several chunks; tied weights get the embedding's and the output's part."""
    shape = {"hidden_size": 8, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 11, "intermediate_size": 6}
    model = make_model(dtype=torch.float64, num_layers=1, tie_word_embeddings=tied, init_std=0.5, **shape)
    batch = pack([5, 3, 6], vocabulary=11, supervised=0.8)
    assert int((batch.weights > 0).sum()) > 4
    rows_per_chunk(monkeypatch, 4, 11, 8)
    names = [name for name, _ in model.named_parameters()]

    def whole(*parameters: Tensor) -> Tensor:
        # The embedding's sparse gradient is densified: gradcheck wants one layout, the trainer adds the two.
        return functional_call(model, dict(zip(names, parameters, strict=True)), tuple(batch))

    model.embedding.sparse = False
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert gradcheck(whole, parameters, check_undefined_grad=False, atol=1e-7, rtol=1e-6)


def test_the_sparse_gradient_of_a_tied_embedding_adds_up() -> None:
    """The embedding of a tied model gives a sparse gradient: the sum is the one that a dense embedding gives."""
    gradients = []
    for sparse in (True, False):
        model, batch = make_model(dtype=torch.float64), pack([9, 20])
        assert model.embedding.sparse
        model.embedding.sparse = sparse
        model(*batch).backward()
        assert model.embedding.weight.grad is not None
        assert not model.embedding.weight.grad.is_sparse
        gradients.append(model.embedding.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(rows=st.integers(1, 40), chunk=st.integers(1, 45))
def test_chunks_change_nothing(rows: int, chunk: int) -> None:
    hidden, weight, targets, weights = case(rows, 6, 13)
    expected = naive(hidden, weight, targets, weights)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    with pytest.MonkeyPatch.context() as patch:
        rows_per_chunk(patch, chunk, 13, 8)
        found = output_loss(hidden, weight, targets, weights)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(torch.autograd.grad(found, (hidden, weight)), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        with torch.no_grad():
            torch.testing.assert_close(output_loss(hidden, weight, targets, weights), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("path", "poison")
@pytest.mark.parametrize("chunk", [64, 9])
def test_bfloat16_against_float64(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_per_chunk(monkeypatch, chunk, 97, 2)
    hidden, weight, targets, weights = case(50, 24, 97, torch.bfloat16)

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return output_loss(h, w, targets, weights)

    def plain(h: Tensor, w: Tensor) -> Tensor:
        return naive(h, w, targets, weights).to(torch.promote_types(h.dtype, torch.float32))

    check_errors(run(ours, (hidden, weight)), run(plain, (hidden, weight)), run(plain, (hidden, weight), wide=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_is_wide(dtype: torch.dtype) -> None:
    hidden, weight, targets, weights = case(5, 4, 11, dtype)
    expected = torch.float64 if dtype is torch.float64 else torch.float32
    assert output_loss(hidden, weight, targets, weights).dtype is expected
    assert output_loss(hidden.detach(), weight.detach(), targets, weights).dtype is expected


@pytest.mark.parametrize("scale", [1.0, -0.37])
def test_upstream_gradient_scales(scale: float) -> None:
    hidden, weight, targets, weights = case(9, 4, 11)
    found = torch.autograd.grad(output_loss(hidden, weight, targets, weights) * scale, (hidden, weight))
    wanted = torch.autograd.grad(naive(hidden, weight, targets, weights) * scale, (hidden, weight))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_is_asked_for_gets_a_gradient(frozen: str) -> None:
    hidden, weight, targets, weights = case(9, 4, 11)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    output_loss(hidden, weight, targets, weights).backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_supervised_position(dtype: torch.dtype) -> None:
    """A micro-batch of padding: loss 0 and gradients of zero everywhere, none missing (ZeRO waits for each)."""
    for tied in (True, False):
        model, batch = make_model(dtype=dtype, tie_word_embeddings=tied), pack([1, 4], supervised=0.0)
        loss = model(*batch)
        assert loss.item() == 0.0
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.to_dense().any(), name
        with torch.no_grad():
            assert float(model(*batch)) == 0.0


def test_unsupervised_positions_weigh_nothing() -> None:
    """Whatever their targets are."""
    model, batch = make_model(), pack([9, 20])
    nonsense = torch.where(batch.weights > 0, batch.targets, 60 - batch.targets)
    assert torch.equal(model(*batch), model(*batch[:4], nonsense, batch.weights))


@pytest.mark.parametrize("tied", [True, False])
def test_given_positions_are_the_only_ones_computed(tied: bool) -> None:
    """As with a weight of 0 everywhere else: the loss and every gradient, with rows that fill a tile."""
    batch = pack([9, 20, 4])
    where = batch.weights.flatten().nonzero()[:, 0]
    fill = where.new_zeros(3)
    supervised = torch.cat((where, fill))
    targets = batch.targets.flatten()[supervised]
    weights = torch.cat((batch.weights.flatten()[where], torch.zeros(3)))
    results = []
    for arguments, options in [
        (batch, {}),
        ((*batch[:4], targets, weights), {"supervised_N": supervised}),
    ]:
        model = make_model(dtype=torch.float64, tie_word_embeddings=tied)
        loss = model(*arguments, **options)
        loss.backward()
        results.append([loss.detach(), *(p.grad.to_dense() for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_host_asks_the_device_for_nothing(pairs: bool) -> None:
    """The whole pass, forward and backward, on a device that can answer nothing: an operation whose result's shape or
    value the host must know (nonzero, item, tolist) raises there."""
    batch, where = pack([9, 20]), torch.arange(8)
    bounds = tuple(batch.cu_seqlens.tolist())
    ids, positions, edges, where, targets, weights = (
        x.to("meta")
        for x in (batch.ids, batch.positions, batch.cu_seqlens, where, batch.targets[0, :8], batch.weights[0, :8])
    )
    options = {"documents_N": where, "pairs_P3": torch.ones(1, 3, device="meta"), "beta": 0.1} if pairs else {}
    model = make_model().to("meta")
    loss = model(ids, positions, edges, 20, targets, weights, supervised_N=where, bounds=bounds, **options)
    loss.flatten()[0].backward()
    assert all(p.grad is not None for p in model.parameters())


class LargestRows(TorchDispatchMode):
    """Records the most rows of any tensor created whose last axis is the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows, self.seen = vocabulary, 0, 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.dim() and self.vocabulary in (tensor.shape[-1], tensor.shape[0]):
                # (rows, V) is logits; so is its transpose, unless it is as wide as the weight and its gradient.
                rows = tensor.numel() // self.vocabulary
                if rows != WIDTH:
                    self.rows, self.seen = max(self.rows, rows), self.seen + 1
        return out


WIDTH, VOCABULARY = 32, 509


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_whole(dtype: torch.dtype, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of more than a chunk's rows has the vocabulary's width, in the forward or the backward pass."""
    model, batch = make_model(dtype=dtype, vocab_size=VOCABULARY), pack([90, 70], vocabulary=VOCABULARY)
    supervised = int((batch.weights > 0).sum())
    rows_per_chunk(monkeypatch, 10, VOCABULARY, torch.empty((), dtype=dtype).element_size())
    assert supervised > 60
    with LargestRows(VOCABULARY) as seen, torch.set_grad_enabled(training):
        loss = model(*batch)
        if training:
            loss.backward()
    assert seen.seen >= supervised // 10
    assert 0 < seen.rows <= 10


def test_the_watch_on_logits_sees_them() -> None:
    """The test above can fail: the naive loss is caught by the same watch."""
    hidden, weight, targets, weights = case(60, WIDTH, VOCABULARY)
    with LargestRows(VOCABULARY) as seen:
        naive(hidden, weight, targets, weights).backward()
    assert seen.rows == 60


def test_chunks_are_even() -> None:
    """No small last chunk: the rows are dealt out evenly in whole tiles, in as few chunks as fit."""
    fits = room.CHUNK_BYTES // (100_352 * 2)
    for rows in (1, fits, fits + 1, 2 * fits + 1, 10 * fits):
        step = room._chunk_rows(torch.empty(100_352, 1, dtype=torch.bfloat16, device="meta"), rows)
        chunks = -(-rows // step)
        assert step <= fits
        assert chunks == -(-rows // fits)
        assert step % ROW_TILE == 0 or step == fits
        assert step - (rows - (chunks - 1) * step) < chunks * ROW_TILE


class Products:
    """Stands for the CUDA products that torch's CPU build lacks, with their signatures and checks (cuda/Blas.cpp):
    half-precision factors, a float32 result, added to in place."""

    def __init__(self) -> None:
        self.made, self.added = 0, 0
        self._mm = torch.mm

    def mm(self, a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        if out_dtype is None:
            return self._mm(a, b) if out is None else self._mm(a, b, out=out)
        assert a.dtype == b.dtype == torch.bfloat16
        assert out_dtype is torch.float32
        self.made += 1
        return self._mm(a.float(), b.float())

    def addmm(self, total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        assert total.dtype is out_dtype is torch.float32
        assert out is total, "another sum of this size would be made for every chunk"
        self.added += 1
        return total.add_(self._mm(a.float(), b.float()))


@pytest.mark.parametrize(("chunk", "chunks"), [(9, 6), (50, 1)])
def test_chunks_add_up_inside_their_products(chunk: int, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: the first chunk's product is float32, each other one's adds to it; a single chunk's is not widened."""
    rows_per_chunk(monkeypatch, chunk, 97, 2)
    hidden, weight, targets, weights = case(50, 24, 97, torch.bfloat16)
    stand_in = Products()
    monkeypatch.setattr(room, "_adds_in_products", lambda device, dtype: True)
    monkeypatch.setattr(torch, "mm", stand_in.mm)
    monkeypatch.setattr(torch, "addmm", stand_in.addmm)

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return output_loss(h, w, targets, weights)

    def plain(h: Tensor, w: Tensor) -> Tensor:
        return naive(h, w, targets, weights).to(torch.promote_types(h.dtype, torch.float32))

    check_errors(run(ours, (hidden, weight)), run(plain, (hidden, weight)), run(plain, (hidden, weight), wide=True))
    assert (stand_in.made, stand_in.added) == ((1, chunks - 1) if chunks > 1 else (0, 0))


def test_torch_has_the_products_with_these_signatures() -> None:
    """What the stand-ins above are called with, on fake CUDA tensors; on a real CPU there is no such product."""
    with FakeTensorMode():
        half = torch.empty(32, 16, dtype=torch.bfloat16, device="cuda")
        total = torch.mm(half.T, half, out_dtype=torch.float32)
        assert (total.dtype, total.shape) == (torch.float32, (16, 16))
        assert torch.addmm(total, half.T, half, out_dtype=torch.float32).dtype is torch.float32
    (schema,) = [torch.ops.aten.addmm.dtype_out._schema]
    assert [a.name for a in schema.arguments] == ["self", "mat1", "mat2", "out_dtype", "beta", "alpha", "out"]
    assert not room._adds_in_products(torch.device("cpu"), torch.bfloat16)


def test_a_torch_without_the_product_adds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked once for a device and a type, and any refusal is an answer."""
    asked = []

    def refuse(*_: Any, **__: Any) -> Tensor:
        asked.append(1)
        raise RuntimeError("self and mat2 must have the same dtype")

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, dtype=None: zeros(*size, dtype=dtype))
    monkeypatch.setattr(torch, "addmm", refuse)
    monkeypatch.setattr(room, "_in_products", {})
    for _ in range(3):
        assert not room._adds_in_products(torch.device("cuda:0"), torch.bfloat16)
    assert len(asked) == 1


def test_a_torch_with_the_product_is_found_by_asking_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked is what the chunks need: half-precision factors added to a float32 matrix, in place."""
    stand_in, zeros = Products(), torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, dtype=None: zeros(*size, dtype=dtype))
    monkeypatch.setattr(torch, "addmm", stand_in.addmm)
    monkeypatch.setattr(room, "_in_products", {})
    for _ in range(3):
        assert room._adds_in_products(torch.device("cuda:0"), torch.bfloat16)
    assert stand_in.added == 1


def test_logits_on_a_cpu_share_memory_that_grows_by_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter more than asked for, up to a full chunk; a smaller chunk's logits lie where larger ones did."""
    vocabulary, full = 12, 14  # rows
    rows_per_chunk(monkeypatch, full, vocabulary, 4)
    monkeypatch.setattr(room, "_workspace", None)
    weight = torch.randn(vocabulary, 4)

    def place(rows: int, dtype: torch.dtype = torch.float32) -> int:
        hidden = torch.randn(rows, 4, dtype=dtype)
        found = room._logits(hidden, weight.to(dtype))
        assert found.dtype is dtype
        torch.testing.assert_close(found, hidden @ weight.to(dtype).T)
        return found.untyped_storage().data_ptr()

    def rows() -> float:
        assert room._workspace is not None
        return room._workspace.numel() / vocabulary

    first = place(8)
    assert rows() == 10
    assert place(5) == place(10) == first
    place(12)
    assert rows() == full, "15 would be more than a chunk"
    place(20)
    assert rows() == 20
    place(20, torch.float64)
    place(3)
    assert rows() == 3.75


@pytest.mark.parametrize("rows", [0, 1, 9, 10])
def test_the_loss_of_each_position(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_per_chunk(monkeypatch, 4, 11, 8)
    hidden, weight, targets, _ = case(rows, 4, 11)
    found = token_losses(hidden, weight, targets)
    assert not found.requires_grad
    assert found.dtype is torch.float64
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none").detach()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("preset", ["debug", "medium", "large", "1b"])
@pytest.mark.parametrize("name", ["a100-40gb", "a100-80gb", "h100", "h100-pcie", "b200", "l40s"])
def test_the_weight_gradients_traffic_is_a_twentieth_of_the_products_time(
    preset: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from the chunks that are chosen and the device's sourced rates, for a full window, all supervised."""
    device, config = find_device(name), load(preset)
    monkeypatch.setattr(room, "_memory", {torch.device("cuda:0"): int(device.memory)})
    share, element = config.vocab_size * config.hidden_size, 2
    chunk = room._chunk_bytes(config.vocab_size, element, torch.device("cuda:0"))
    rows = chunk // (config.vocab_size * element)
    traffic = 8 * share / (device.bandwidth * STREAM)
    products = 6 * rows * share / (device.peak["bf16"] * device.matmul)
    assert traffic <= 0.051 * products
    assert chunk <= device.memory / 32
    assert rows % ROW_TILE == 0
    # And the plan counts the same chunk.
    shape = Setup(64, 1, 1, "bf16")
    logits = output_chunk_bytes(config.vocab_size, element, device.memory)
    assert logits == chunk
    with_chunk, without = (
        output_layers_memory(config, replace(shape, supervised=s), capacity=device.memory).output for s in (1.0, 0.0)
    )
    assert with_chunk > without + chunk


def test_a_small_card_has_small_chunks_and_a_cpu_its_own() -> None:
    assert output_chunk_bytes(100_352, 2, 16e9) <= 16e9 / 32
    assert output_chunk_bytes(100_352, 2, None) == 8_000 * 100_352 * 2
    assert output_chunk_bytes(10**6, 4, 1e6) == 4 * 10**6, "one row at least"
    assert room._chunk_bytes(100_352, 2, torch.device("cpu")) == 256 * 2**20
