import importlib
import json
import mmap
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from lumina.kernels import cross_entropy_, launch, reference, rope_
from lumina.kernels.launch import Launch, Tile

norms = importlib.import_module("lumina.kernels.rms_norm_kernels")
swiglus = importlib.import_module("lumina.kernels.swiglu")

#: Elements between rows: the third row starts past 2^31.
FAR = 2**30 + 16


def far(rows: int, width: int) -> torch.Tensor:
    """bf16 rows `FAR` elements apart, in memory that exists only where it is touched."""
    store = torch.frombuffer(mmap.mmap(-1, 2 * ((rows - 1) * FAR + width)), dtype=torch.bfloat16)
    view = store.as_strided((rows, width), (FAR, 1))
    view.copy_(torch.randn(rows, width))
    return view


# ---------------------------------------------------------------- 64-bit offsets


def test_norm_reads_and_writes_past_two_to_the_31() -> None:
    x, residual, y, total, dx = (far(3, 40) for _ in range(5))
    weight, dweight = torch.randn(40).bfloat16(), torch.empty(40).bfloat16()
    norms.forward_launch(x, residual, weight, y, total, 1e-5)()
    expected = reference.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(total.clone(), expected[1])
    torch.testing.assert_close(y.clone(), expected[0])
    for step in norms.backward_launches(y, x, weight, residual, dx, dweight, 1e-5):
        step()
    given = [t.clone().requires_grad_() for t in (x, weight)]
    gradients = torch.autograd.grad(reference.rms_norm(*given, 1e-5), given, y.clone())
    torch.testing.assert_close(dx.clone(), gradients[0] + residual, rtol=0.02, atol=0.02)
    torch.testing.assert_close(dweight, gradients[1])


def test_wide_norm_reads_and_writes_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same by the two-sweep kernels, made to take narrow rows."""
    monkeypatch.setattr(norms, "FUSED_FORWARD", 0)
    monkeypatch.setattr(norms, "FUSED_BACKWARD", 0)
    test_norm_reads_and_writes_past_two_to_the_31()


def test_swiglu_reads_and_writes_past_two_to_the_31() -> None:
    x, h, dx = far(3, 80), far(3, 40), far(3, 80)
    swiglus.forward_launch(x, h)()
    given = x.clone().requires_grad_()
    expected = reference.swiglu(given)
    torch.testing.assert_close(h.clone(), expected.detach())
    swiglus.backward_launch(h, x, dx)()
    torch.testing.assert_close(dx.clone(), torch.autograd.grad(expected, given, h.clone())[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("far_heads", [False, True])
def test_rope_reads_and_writes_past_two_to_the_31(far_heads: bool) -> None:
    # Tokens far apart, then heads far apart.
    q, k = ((far(3, 16).view(3, 1, 16) if not far_heads else far(3, 16).view(1, 3, 16)) for _ in range(2))
    angles = torch.rand(3, 8)
    positions = torch.arange(q.shape[0])
    expected = reference.rope(q.clone(), k.clone(), angles.cos(), angles.sin(), positions)
    rope_(q, k, angles.cos(), angles.sin(), positions)
    torch.testing.assert_close(q.clone(), expected[0])
    torch.testing.assert_close(k.clone(), expected[1])


def test_cross_entropy_reads_and_writes_past_two_to_the_31() -> None:
    logits = far(3, 50)
    copy = logits.clone()
    targets, weights = torch.tensor([1, 2, 49]), torch.ones(3)
    expected = reference.cross_entropy_(copy, targets, weights)
    torch.testing.assert_close(cross_entropy_(logits, targets, weights), expected)
    torch.testing.assert_close(logits.clone(), copy)


# ---------------------------------------------------------------- nothing written outside the outputs


def framed(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(store of sevens, a view of its middle)."""
    store = torch.full((rows + 9, width + 150), 7.0)
    return store, store[2 : rows + 2, 3 : width + 3]


def frame_is_whole(store: torch.Tensor, view: torch.Tensor) -> bool:
    view.fill_(7.0)
    return bool((store == 7.0).all())


@pytest.mark.parametrize("wide", [False, True])
def test_norm_writes_nothing_outside(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wide:
        monkeypatch.setattr(norms, "FUSED_FORWARD", 0)
        monkeypatch.setattr(norms, "FUSED_BACKWARD", 0)
        monkeypatch.setattr(norms, "SWEEP", 64)
    x, weight = torch.randn(5, 37), torch.randn(37)
    with launch.planned_for(1):  # one block holds all five rows, and more
        write_norm(x, weight)


def write_norm(x: torch.Tensor, weight: torch.Tensor) -> None:
    (y_store, y), (total_store, total), (dx_store, dx), (dw_store, dw) = (framed(*s) for s in [(5, 37)] * 3 + [(1, 37)])
    norms.forward_launch(x, x, weight, y, total, 1e-5)()
    for step in norms.backward_launches(x, x, weight, x, dx, dw[0], 1e-5):
        step()
    assert all(not (view == 7.0).any() for view in (y, total, dx, dw))
    for store, view in ((y_store, y), (total_store, total), (dx_store, dx), (dw_store, dw)):
        assert frame_is_whole(store, view)


def test_swiglu_writes_nothing_outside() -> None:
    x = torch.randn(5, 74)
    (h_store, h), (dx_store, dx) = framed(5, 37), framed(5, 74)
    with launch.planned_for(1):
        swiglus.forward_launch(x, h)()
        swiglus.backward_launch(h, x, dx)()
    assert frame_is_whole(h_store, h)
    assert frame_is_whole(dx_store, dx)


def test_rope_writes_nothing_outside() -> None:
    # Five heads make two groups of three, the last head of the second past the end; so for the second head of k.
    store = torch.full((3, 9, 10, 30), 7.0)
    q, k = store[:2, :5, 1:6, 2:26], store[:2, :5, 7:8, 2:26]
    angles = 1 + torch.rand(5, 12)
    rope_(q, k, angles.cos(), angles.sin(), torch.arange(5))
    q.fill_(7.0)
    k.fill_(7.0)
    assert (store == 7.0).all()


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("width", [1, 3, 123, 256, 704, 768, 1024, 2048, 5504, 8192])
def test_norm_tiles(width: int, backward: bool, size: int) -> None:
    tile = launch.norm_tiles(width, 8192, 132, size, backward=backward)[0]
    assert tile.cols >= width
    assert tile.cols < 2 * width or width == 1
    per_thread = tile.rows * tile.cols / (32 * tile.warps)
    assert per_thread * size <= (32 if backward else 64)
    # Not bound by launches: narrow rows share a program; and no multiprocessor idles.
    assert tile.rows * tile.cols >= min(4096, width * 8192 // 132 // 2)
    assert -(-8192 // tile.rows) >= 132


def test_few_rows_are_spread_over_the_card() -> None:
    assert launch.norm_tiles(256, 132, 132, 2, backward=False)[0].rows == 1


@pytest.mark.parametrize("width", [1, 7, 704, 1408, 2048, 2752, 5504, 65536])
def test_elementwise_tiles_waste_little(width: int) -> None:
    tile = launch.elementwise_tiles(width, 8192, 132)[0]
    blocks = -(-width // tile.cols)
    assert blocks * tile.cols <= max(1.05 * width, 64)


# ---------------------------------------------------------------- tuning


@triton.jit
def _fill(x_ptr, COLS: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, COLS), 1.0)


def test_tuning_picks_the_fastest_and_remembers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUMINA_KERNELS_AUTOTUNE", "1")
    monkeypatch.setenv("LUMINA_KERNELS_CACHE", str(tmp_path / "deep" / "tuned.json"))
    monkeypatch.setattr(launch, "_tuned", {})
    tiles = [Tile(1, cols, 1) for cols in (8, 16, 32)]
    x = torch.zeros(32)
    asked: list[int] = []

    def timer(run: Launch) -> float:
        run()
        asked.append(run.constants["COLS"])
        return {8: 3.0, 16: 1.0, 32: 2.0}[asked[-1]]

    def pick() -> Tile:
        build = lambda tile: Launch(_fill, (1,), (x,), {"COLS": tile.cols}, tile.warps)
        return launch.pick("fill", tiles, build, device=x.device, timer=timer)

    assert pick() == tiles[1]
    assert asked == [8, 16, 32]
    assert pick() == tiles[1]
    monkeypatch.setattr(launch, "_tuned", {})  # a new process reads the file
    assert pick() == tiles[1]
    assert len(asked) == 3
    (tmp_path / "deep" / "tuned.json").write_text('{"torn')
    monkeypatch.setattr(launch, "_tuned", {})
    assert pick() == tiles[1]
    assert len(asked) == 6
    (kept,) = json.loads((tmp_path / "deep" / "tuned.json").read_text()).values()
    assert kept["cols"] == 16


def test_no_tuning_unless_asked() -> None:
    def build(tile: Tile) -> Launch:
        raise AssertionError("nothing is to be built")

    tiles = [Tile(1, 8, 1), Tile(1, 16, 1)]
    assert launch.pick("fill", tiles, build, device=torch.device("cpu"), timer=lambda run: 1.0) == tiles[0]


# ---------------------------------------------------------------- the interpreter's rounding


@triton.jit
def _convert(x_ptr, y_ptr, COLS: tl.constexpr):
    col = tl.arange(0, COLS)
    tl.store(y_ptr + col, tl.load(x_ptr + col).to(y_ptr.dtype.element_ty))


def test_the_interpreter_rounds_to_nearest_even() -> None:
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    x[:8] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.00390625, 1.01171875, 3.4e38])
    y = torch.empty(4096, dtype=torch.bfloat16)
    _convert[(1,)](x, y, COLS=4096)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(4096)
    _convert[(1,)](y, back, COLS=4096)
    torch.testing.assert_close(back, y.float(), rtol=0, atol=0, equal_nan=True)
