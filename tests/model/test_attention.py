"""One result from every attention path, and no query that sees another document or its own future."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lumina.model import attention as room
from lumina.model.attention import Documents, Scoring, attention
from tests.model.tiny_models import check_errors, make_model, pack, run

LENGTHS = [[1], [300], [5, 1, 40, 17], [256, 257, 3]]


def documents(lengths: list[int]) -> Documents:
    batch = pack(lengths)
    return Documents.of(batch.ids, batch.cu_seqlens, batch.max_seqlen)


def inputs(total: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    draw = torch.Generator().manual_seed(total)
    return [
        torch.randn(1, total, n, width, generator=draw).to(dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)
    ]


def masked(lengths: list[int]) -> Tensor:
    """Which keys each query sees: its own document's, up to itself."""
    document = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])
    return (document[:, None] == document[None]) & torch.ones(len(document), len(document), dtype=torch.bool).tril()


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The definition, each operation rounded as it is written, softmax in float32 or better."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    wide = torch.promote_types(q.dtype, torch.float32)
    return (scores.softmax(-1, dtype=wide).to(q.dtype) @ v).transpose(1, 2)


@pytest.mark.usefixtures("compiled", "poison")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 16), (3, 3, 6), (6, 1, 64)])
def test_bfloat16_against_float64(lengths: list[int], heads: int, kv_heads: int, width: int) -> None:
    """Blocks of products: outputs and gradients within twice the error of the plain bfloat16 one."""
    docs, mask = documents(lengths), masked(lengths)
    given_ = inputs(sum(lengths), heads, kv_heads, width)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, docs)

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q, k, v, mask)

    check_errors(run(ours, given_), run(definition, given_), run(definition, given_, wide=True))


@pytest.mark.usefixtures("compiled")
def test_bfloat16_takes_the_block_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above means what it says: SDPA is not called where the compiled loops are."""
    monkeypatch.setattr(room, "_sdpa", None)
    for docs in (documents([9, 4]), None):
        assert attention(*inputs(13, 4, 2, 8), docs).shape == (1, 13, 4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sdpa_is_the_definition(dtype: torch.dtype) -> None:
    lengths = [5, 1, 40, 17]
    docs, mask, given_ = documents(lengths), masked(lengths), inputs(63, 4, 2, 16, dtype)
    found = run(lambda q, k, v: attention(q, k, v, docs), given_)
    for ours, exact in zip(found, run(lambda q, k, v: plain(q, k, v, mask), given_), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("compiled")
def test_a_first_query_has_no_gradient() -> None:
    """It sees one key, so its probability is 1 whatever it is: exactly zero, though dP is stored in bfloat16."""
    docs = documents([1, 4, 1])
    _, dq, dk, _ = run(lambda q, k, v: attention(q, k, v, docs), inputs(6, 4, 2, 16))
    assert not dq[:, [0, 1, 5]].any()
    assert not dk[:, [0, 5]].any()


def test_several_rows_without_documents() -> None:
    q, k, v = (torch.cat([x, x.flip(1)]) for x in inputs(20, 4, 2, 8, torch.float64))
    mask = masked([20])
    torch.testing.assert_close(attention(q, k, v, None), plain(q, k, v, mask))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=2, max_size=5), data=st.data())
def test_another_document_changes_nothing(dtype: torch.dtype, lengths: list[int], data: st.DataObject) -> None:
    """Every value of one document is changed: the outputs and gradients of the others are the same bit for bit."""
    victim = data.draw(st.integers(0, len(lengths) - 1))
    edges = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    changed = slice(edges[victim], edges[victim + 1])
    docs = documents(lengths)

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, docs)

    before = inputs(sum(lengths), 4, 2, 8, dtype)
    after = [x.detach().clone() for x in before]
    for x in after:
        x[:, changed] = 100.0 * x[:, changed].roll(1, -1) + 7.0
    for a, b in zip(run(one, before), run(one, [x.requires_grad_() for x in after]), strict=True):
        kept = torch.ones(a.shape[1], dtype=torch.bool)
        kept[changed] = False
        assert torch.equal(a[:, kept], b[:, kept])
    assert not torch.equal(one(*before)[:, changed], one(*after)[:, changed])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_future_changes_nothing(dtype: torch.dtype) -> None:
    before = inputs(300, 4, 2, 8, dtype)
    after = [x.detach().clone() for x in before]
    for x in after:
        x[:, 280:] = 5.0 - x[:, 280:]
    a, b = (attention(*x, documents([300])) for x in (before, after))
    assert torch.equal(a[:, :280], b[:, :280])


def test_nan_stays_inside_its_document(path: str) -> None:
    """And comes out there. (torch's own half-precision SDPA on a CPU swallows a NaN among the scores; in the model it
    still comes out, through the residual: see test_nan_reaches_the_loss.)"""
    docs = documents([6, 9, 5])
    for index in range(3):
        given_ = inputs(20, 4, 2, 8)
        with torch.no_grad():
            given_[index][0, 8, 0, 0] = float("nan")
        output, dq, dk, dv = run(lambda q, k, v: attention(q, k, v, docs), given_)
        for result in (output, dq, dk, dv):
            dirty = result.isnan().flatten(2).any(-1)[0]
            assert not dirty[:6].any()
            assert not dirty[15:].any()
        if path == "compiled":
            assert output.isnan().any()
            assert dq.isnan().any()


# --- Windows, and GPUs without a variable-length kernel ---


@pytest.mark.parametrize("window", [1, 3, 17, 100])
@pytest.mark.parametrize("lengths", [[20], [5, 1, 40, 17]])
def test_a_window_is_the_definition(lengths: list[int], window: int) -> None:
    total = sum(lengths)
    near = torch.arange(total)[:, None] - torch.arange(total) < window
    docs, mask, given_ = documents(lengths), masked(lengths) & near, inputs(total, 4, 2, 16, torch.float64)
    found = run(lambda q, k, v: attention(q, k, v, docs, Scoring(window)), given_)
    for ours, exact in zip(found, run(lambda q, k, v: plain(q, k, v, mask), given_), strict=True):
        torch.testing.assert_close(ours, exact)
    if len(lengths) == 1:
        torch.testing.assert_close(attention(*given_, None, Scoring(window)), plain(*given_, mask))


@pytest.mark.usefixtures("compiled", "poison")
@pytest.mark.parametrize(("lengths", "window"), [([13], 2), ([520, 3, 300], 1), ([520, 3, 300], 70), ([300], 600)])
def test_blocks_in_bfloat16_take_windows_and_scales(lengths: list[int], window: int) -> None:
    """Blocks of 256 queries over the keys that any of them sees, 70 of them on the edge of two blocks."""
    total = sum(lengths)
    given_, near = inputs(total, 4, 2, 16), torch.arange(total)[:, None] - torch.arange(total) < window
    docs, mask = documents(lengths), masked(lengths) & near
    scaled = lambda q, k, v: plain(q * 0.3 * 4, k, v, mask)
    exact = run(scaled, given_, wide=True)
    found = run(lambda q, k, v: attention(q, k, v, docs, Scoring(window, scale=0.3)), given_)
    check_errors(found, run(scaled, given_), exact)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("window", [None, 3])
def test_a_soft_cap_is_the_definition(window: int | None) -> None:
    """In every layout; scores are far beyond the cap."""
    lengths, scoring = [5, 1, 40, 17], Scoring(window, 2.0, 1.5)
    near = torch.arange(63)[:, None] - torch.arange(63) < (window or 99)

    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(2, 1) for x in (k, v))
        scores = (1.5 * torch.tanh(q @ k.mT * 2.0 / 1.5)).masked_fill(~(masked(lengths) & near), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)

    given_, docs = inputs(63, 4, 2, 16, torch.float64), documents(lengths)
    exact = run(capped, given_)
    for way in (attention, room._by_length):
        found = run(lambda q, k, v, way=way: way(q, k, v, docs, scoring), given_)
        for ours, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(ours, theirs)
    half = [x.detach().bfloat16() for x in given_]
    torch.testing.assert_close(attention(*half, docs, scoring).double(), exact[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("lengths", [*LENGTHS, [1] * 90 + [2, 3] * 30 + [700, 64, 65]], ids=lambda v: str(v)[:20])
def test_documents_of_like_lengths_at_once(
    lengths: list[int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of GPUs without a variable-length kernel: the definition, in few calls over few rows more."""
    calls = []
    sdpa = room._sdpa

    def counted(q: Tensor, *others: Any) -> Tensor:
        calls.append(q.shape[0] * q.shape[1])
        return sdpa(q, *others)

    docs, total = documents(lengths), sum(lengths)
    given_ = inputs(total, 4, 2, 8, torch.float64)
    exact = run(lambda q, k, v: room._by_document(q, k, v, docs, Scoring(window)), given_)
    monkeypatch.setattr(room, "_sdpa", counted)
    found = run(lambda q, k, v: room._by_length(q, k, v, docs, Scoring(window)), given_)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(calls) <= max(lengths).bit_length() + 1
    assert sum(calls) <= 2 * total
    assert docs.groups(torch.device("cpu")) is docs.groups(torch.device("cpu")), "made by the first layer for all"


def test_places_go_to_a_gpu_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From any other the host would wait until the device has them."""
    pinned, sent = [], []

    def pin(self: Tensor) -> Tensor:
        pinned.append(self.clone())
        return pinned[-1]

    def to(self: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        sent.append((any(self is one for one in pinned), non_blocking))
        return self

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    documents([3, 9, 12]).groups(torch.device("cuda"))
    assert sent == [(True, True)] * 3
    pinned.clear()
    documents([3, 9, 12]).groups(torch.device("cpu"))
    assert not pinned


@pytest.mark.parametrize(
    ("card", "dtype", "masked_", "repeated"),
    [
        ((9, 0), torch.bfloat16, False, False),
        ((9, 0), torch.bfloat16, True, True),
        ((9, 0), torch.float32, False, True),
        ((7, 5), torch.float16, False, True),
    ],
)
def test_no_kernel_is_asked_for_what_it_refuses(
    card: tuple[int, int], dtype: torch.dtype, masked_: bool, repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU fewer key heads go to the flash kernel alone; anything else would be the plain way, O(S^2) memory."""
    asked: list[tuple[int, bool, bool]] = []

    def sdpa(
        q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Any, is_causal: bool, enable_gqa: bool, scale: Any
    ) -> Tensor:
        asked.append((k.shape[1], enable_gqa, attn_mask is not None))
        return q

    monkeypatch.setattr(room.F, "scaled_dot_product_attention", sdpa)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: card)
    with FakeTensorMode():
        q = torch.empty(1, 8, 32, 16, dtype=dtype, device="cuda")
        k = torch.empty(1, 2, 32, 16, dtype=dtype, device="cuda")
        seen = torch.empty(32, 32, dtype=torch.bool, device="cuda") if masked_ else None
        room.grouped_sdpa(q, k, k, seen, causal=not masked_)
    assert asked == [(8 if repeated else 2, not repeated, masked_)]


def test_a_model_refuses_cudnns_attention() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    make_model()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# --- The whole model ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_packed_is_each_document_alone(dtype: torch.dtype, lengths: list[int]) -> None:
    """Logits, loss and gradients of a packed row are those of its documents one by one (law 2)."""
    model, batch = make_model(dtype=dtype), pack(lengths)
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        packed = model(*batch[:4])
        alone = torch.cat([model(d.ids, d.positions) for d in batch.documents()], 1)
    torch.testing.assert_close(packed, alone, **close)
    loss = model(*batch)
    parameters = list(model.parameters())
    together = torch.autograd.grad(loss, parameters)
    total, apart = torch.zeros_like(loss), [torch.zeros_like(p) for p in parameters]
    for document in batch.documents():
        part = model(*document)
        total += part.detach()
        for sum_, gradient in zip(apart, torch.autograd.grad(part, parameters), strict=True):
            sum_ += gradient
    torch.testing.assert_close(loss.detach(), total, **close)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a.to_dense(), b, **close)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_leaks_nothing_between_documents(dtype: torch.dtype) -> None:
    model, batch = make_model(dtype=dtype), pack([7, 12, 5])
    changed = batch.ids.clone()
    changed[0, 7:19] = (changed[0, 7:19] + 13) % 61
    with torch.no_grad():
        before, after = model(*batch[:4]), model(changed, *batch[1:4])
    assert torch.equal(before[:, :7], after[:, :7])
    assert torch.equal(before[:, 19:], after[:, 19:])
    assert not torch.equal(before[:, 7:19], after[:, 7:19])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_reaches_the_loss_or_the_gradients(dtype: torch.dtype) -> None:
    """Wherever in the model it arises: that is what a step is skipped by."""
    batch = pack([7, 12, 5])
    for name, _ in make_model().named_parameters():
        model = make_model(dtype=dtype)
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0 if "embedding" not in name else int(batch.ids[0, 0]) * 32] = torch.nan
        loss = model(*batch)
        loss.backward()
        found = [loss, *(p.grad.to_dense() for p in model.parameters() if p.grad is not None)]
        assert any(x.isnan().any() for x in found), name


def test_the_longest_document_is_found() -> None:
    batch = pack([3, 9, 4])
    found = Documents.of(batch.ids, batch.cu_seqlens, None)
    assert found.max_seqlen == 9
    assert list(found.edges()) == [(0, 3), (3, 12), (12, 16)]
    assert list(Documents.of(batch.ids, batch.cu_seqlens, 9, (0, 3, 12, 16)).edges()) == [(0, 3), (3, 12), (12, 16)]


def test_bounds_are_never_asked_of_a_device() -> None:
    """Reading them there would make the host wait for all that the device has to do, once a layer."""
    batch = pack([3, 9, 4])
    ids, edges = batch.ids.to("meta"), batch.cu_seqlens.to("meta")  # a device that can answer nothing
    assert Documents.of(ids, edges, None, (0, 3, 12, 16)).max_seqlen == 9
    with pytest.raises(AssertionError, match="the longest document or the bounds"):
        Documents.of(ids, edges, None)
    with pytest.raises(AssertionError, match="the host must know"):
        Documents.of(ids, edges, 9).edges()
