"""Static decoding steps against the ordinary ones, and what a CUDA graph demands of them, without a card."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lumina.config import FAMILIES
from lumina.model import KVCache, StaticDecoder, Transformer, static_fits
from lumina.model import cache as room
from lumina.model.static import Replay, candidate_bucket, length_bucket, row_bucket
from lumina.model.varlen import Spans
from tests.model.tiny_models import make_model
from tests.model.variable_length import by_spans

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"experts": {"count": 4}},
    "qwen3_moe": {"experts": {"count": 4, "size": 24, "dense_layers": [1]}},
    "olmoe": {"experts": {"count": 4, "norm_topk_prob": False}},
}
SHAPES: dict[str, dict[str, Any]] = {
    **{name: {"family": name} | EXPERTS.get(name, {}) for name in FAMILIES.names()},
    "wide heads": {"family": "qwen3", "head_size": 20},
    "windows": {"family": "gemma3_text", "sliding_window": 7, "sliding_layers": [0], "sliding_rope_theta": 50.0},
    "soft caps": {"family": "gemma2", "attention_softcap": 2.0, "logit_softcap": 3.0, "attention_scale": 0.6},
    "one head each": {"num_kv_heads": 4, "tie_word_embeddings": False},
    "scaled": {"rope_scaling": {"type": "linear", "factor": 4.0}},
}
CAPACITY, ROWS = 700, 5


def greedy(kept_Rk: Tensor, ids_Rk: Tensor, settings_RF: Tensor) -> Tensor:
    return ids_Rk[:, :1] + settings_RF[:, :1].long() * 1000


def opened(model: Transformer) -> tuple[KVCache, StaticDecoder]:
    weight = model.embedding.weight
    cache = KVCache(model.config, ROWS, CAPACITY, weight)
    forbidden_V = torch.arange(model.config.vocab_size) % 7 == 3
    return cache, StaticDecoder(model, cache, forbidden_V.to(weight.device), greedy, settings=1, told=1)


def fill(model: Transformer, cache: KVCache, lengths: dict[int, int]) -> None:
    """Prefill rows with random ids, in pieces."""
    for row, length in lengths.items():
        ids = torch.randint(0, 61, (1, length), generator=torch.Generator().manual_seed(row))
        for piece in ids.split(200, dim=1):
            model(piece, cache.extend([row], [piece.shape[1]]), cache=cache)


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_static_steps_are_the_ordinary_ones(shape: str) -> None:
    """Rows join and leave, one waits in the middle of its prompt, and lengths pass from a bucket to the next."""
    model = make_model(dtype=torch.float64, **{"seq_length": CAPACITY} | SHAPES[shape])
    plain = KVCache(model.config, ROWS, CAPACITY, model.embedding.weight)
    cache, static = opened(model)
    for one in (plain, cache):
        fill(model, one, {0: 250, 1: 3, 3: 400, 4: 1})
    buffers = (cache.keys, cache.values, static._inputs_RF, static._told_Rt)
    addresses = [buffer.data_ptr() for buffer in buffers]
    going, draw = [0, 1, 4], torch.Generator().manual_seed(9)
    for at in range(12):
        going = {4: [0, 1], 6: [1], 8: [0, 1, 2, 3]}.get(at, going)
        if at == 8:
            for one in (plain, cache):
                fill(model, one, {2: 5})
        ids = torch.randint(0, 61, (len(going),), generator=draw).tolist()
        positions = plain.extend(going, [1] * len(going), decode=True)
        wanted_RV = model(torch.tensor(ids)[:, None], positions, cache=plain)[:, 0]
        torch.testing.assert_close(static.logits(ids, going), wanted_RV)
        assert cache.lengths == plain.lengths
        wanted_RV[:, 3::7] = -torch.inf
        for row in going:  # the same step again, now choosing
            cache.free(row, cache.lengths[row] - 1)
        told = static.step(ids, going, torch.arange(len(going)).double()[:, None], 1)
        best = wanted_RV.argmax(-1).tolist()
        assert told == [[token + 1000 * place] for place, token in enumerate(best)]
    for row, length in enumerate(plain.lengths):
        torch.testing.assert_close(cache.keys[:, row, :, :length], plain.keys[:, row, :, :length])
    assert [buffer.data_ptr() for buffer in buffers] == addresses
    assert len(static._steps) > 4


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_what_a_waiting_row_was_given_harms_no_later_one(shape: str) -> None:
    """A long row waits beside a short one, is given up, and its row begins anew with little, beside a long one."""
    model = make_model(dtype=torch.float64, **{"seq_length": CAPACITY} | SHAPES[shape])
    plain = KVCache(model.config, ROWS, CAPACITY, model.embedding.weight)
    cache, static = opened(model)
    fill(model, cache, {0: 5, 1: 500})
    static.logits([7], [0])
    for row in (0, 1):
        cache.free(row)
    for one in (plain, cache):
        fill(model, one, {0: 600, 1: 3})
    wanted_RV = model(torch.tensor([[8], [9]]), plain.extend([0, 1], [1, 1], decode=True), cache=plain)[:, 0]
    torch.testing.assert_close(static.logits([8, 9], [0, 1]), wanted_RV)


class Recorder(TorchDispatchMode):
    """Operations and the shapes of their tensors, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        values = [tuple(a.shape) if isinstance(a, Tensor) else a for a in torch.utils._pytree.tree_leaves(args)]
        self.calls.append((str(function), values))
        return out


@pytest.mark.parametrize("candidates", [0, 2, None])
@pytest.mark.parametrize("shape", [name for name in SHAPES if name not in EXPERTS])
@torch.inference_mode()
def test_a_step_asks_the_device_for_nothing(shape: str, candidates: int | None) -> None:
    """On the device meta a question raises; and whatever the lengths, the operations and their shapes are the same."""
    model = make_model(**{"seq_length": CAPACITY} | SHAPES[shape]).to("meta")
    with pytest.raises(NotImplementedError):
        model.embedding.weight.tolist()
    cache, static = opened(model)
    seen = []
    for lengths in ([3, 2, 1], [0, 0, 0], [200, 1, 90]):  # the first makes what is made once
        cache.lengths[:3] = lengths
        with Recorder() as recorder:
            if candidates == 0:
                static.logits([4, 5, 6], [0, 1, 2])
            else:
                static.launch([4, 5, 6], [0, 1, 2], torch.zeros(3, 1, dtype=torch.float64), candidates)
        seen.append(recorder.calls)
    assert seen[1] == seen[2]
    names = Counter(name for name, _ in seen[1])
    assert names["aten.embedding.default"] == 1
    assert not [name for name in names if "nonzero" in name or "local_scalar" in name or "unique" in name]


@torch.inference_mode()
def test_spans_of_a_kernel_that_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU whose kernel reads each row up to its length: no mask, the cache itself, an upper bound for all."""
    calls: list[Spans] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float | None) -> Tensor:
        assert k.untyped_storage().data_ptr() == cache.keys.untyped_storage().data_ptr(), "the cache itself"
        calls.append(spans)
        return by_spans(q, k, v, spans, scale)

    monkeypatch.setattr(room, "_token_major", lambda device: True)
    monkeypatch.setattr(room, "spans_kernel", lambda dtype: attend)
    model = make_model(dtype=torch.float64, seq_length=CAPACITY)
    cache, static = opened(model)
    fill(model, cache, {0: 9, 1: 300, 2: 30})
    ids_T = torch.randint(0, 61, (1, 30), generator=torch.Generator().manual_seed(2))
    found = static.logits([5, 7], [0, 2])
    whole = model(torch.cat((ids_T, torch.tensor([[7]])), 1), torch.arange(31)[None])[0, -1]
    torch.testing.assert_close(found[1], whole)
    assert [spans.longest for spans in calls] == [384] * 2
    assert calls[0].used.tolist() == [10, 301, 31, 1]


@pytest.mark.parametrize(
    ("bucket", "given", "found"),
    [
        (row_bucket, (1, 24), 1),
        (row_bucket, (5, 24), 8),
        (row_bucket, (17, 24), 24),
        (length_bucket, (1, 4096), 256),
        (length_bucket, (257, 4096), 384),
        (length_bucket, (385, 4096), 512),
        (length_bucket, (3000, 3500), 3072),
        (length_bucket, (3100, 3500), 3500),
        (candidate_bucket, (1, 1000), 2),
        (candidate_bucket, (50, 1000), 64),
        (candidate_bucket, (65, 1000), 1000),
        (candidate_bucket, (None, 1000), 1000),
        (candidate_bucket, (3, 61), 61),
    ],
)
def test_buckets(bucket: Any, given: tuple[Any, ...], found: int) -> None:
    assert bucket(*given) == found


def test_a_graph_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for torch's graphs: the calls that do not run the function replay what was captured. A capture
    that fails is made again at the next call."""
    done: list[str] = []

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    class Capture:
        def __init__(self, graph: Any, pool: Any, capture_error_mode: str) -> None:
            assert (type(graph), pool, capture_error_mode) == (Graph, "pool", "thread_local")

        def __enter__(self) -> None:
            done.append("capture")

        def __exit__(self, *error: Any) -> None:
            done.append("captured")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    replay = Replay(torch.device("cuda"), "pool")
    for _ in range(5):
        replay(lambda: done.append("run"))
    assert done == ["run"] * 3 + ["capture", "run", "captured", "replay", "replay"]

    def fail() -> None:
        raise torch.OutOfMemoryError

    failing, done[:] = Replay(torch.device("cuda"), "pool"), []
    for function in (*[lambda: None] * 3, fail, fail, lambda: done.append("run")):
        with contextlib.suppress(torch.OutOfMemoryError):
            failing(function)
    assert done == ["capture", "captured"] * 2 + ["capture", "run", "captured", "replay"]


@pytest.mark.parametrize("shape", SHAPES)
def test_experts_that_are_multiplied_one_by_one_are_left_out(shape: str) -> None:
    assert static_fits(make_model(**SHAPES[shape])) == (shape not in EXPERTS)
