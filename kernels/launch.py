"""Kernel launches: block shapes, the number of programs, tuning, and the registration of operators.

Every operator builds a `Launch` (kernel, grid, arguments, compile-time constants). The same `Launch` is run on a GPU,
run in Triton's interpreter, and, built from `meta` tensors, compiled by `static.py` for cards that are not here.
There is one source of truth, so what the tests prove about registers, spills and bytes holds for what is launched.

Shapes: N rows, W width (last dimension), both counted in elements.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from .timing import milliseconds_of_launch

#: True when kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

if INTERPRETED:
    from . import interpreter

    interpreter.install()

#: Programs are planned for this many multiprocessors where no device can be asked (an H100 SXM has 132).
DEFAULT_MULTIPROCESSORS = 132

FLOAT_TYPES = (torch.bfloat16, torch.float16, torch.float32)

_LIBRARY = torch.library.Library("lumina", "FRAGMENT")  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Tile:
    """A block of `rows` x `cols` elements worked on by `warps` warps of 32 threads."""

    rows: int
    cols: int
    warps: int


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `constants` are compile-time values, `warps` the warps of a program."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int

    def __call__(self) -> Any:
        """Run it on the device of its first tensor (or in the interpreter); returns what Triton compiled, if it did."""
        device = self.args[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.kernel[self.grid](*self.args, **self.constants, num_warps=self.warps)
        return self.kernel[self.grid](*self.args, **self.constants, num_warps=self.warps)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


@functools.cache
def _multiprocessors_of(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


_planned: ContextVar[int] = ContextVar("planned", default=DEFAULT_MULTIPROCESSORS)


@contextlib.contextmanager
def planned_for(sms: int) -> Iterator[None]:
    """Plan launches on tensors that are on no GPU for a card of `sms` multiprocessors."""
    token = _planned.set(sms)
    try:
        yield
    finally:
        _planned.reset(token)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; for any other device what `planned_for` says."""
    if device.type != "cuda":
        return _planned.get()
    return _multiprocessors_of(torch.cuda.current_device() if device.index is None else device.index)


# ---------------------------------------------------------------- the table


def norm_tiles(width: int, rows: int, sms: int, size: int, *, backward: bool) -> list[Tile]:
    """Tiles for a row-wise norm of elements of `size` bytes, best guess first; the rest are candidates for tuning.

    A forward thread holds 32 elements of a row, a backward one 16 (it also holds the weight's gradient, the incoming
    gradient and the next tile), half as many of 4 bytes: past that the compiler spills. Narrow rows share a program, so
    that a launch has few enough programs not to be bound by them, but never so many rows that multiprocessors stay
    idle.
    """
    cols = power_of_two(width)
    elements, per_thread = (4096, 16) if backward else (4096, 32)
    if size > 2:
        per_thread //= 2
    height = max(1, elements // cols)
    while height > 1 and cdiv(rows, height) < sms:
        height //= 2
    warps = min(32, max(1, height * cols // (32 * per_thread)))
    return _around(Tile(height, cols, warps))


def elementwise_tiles(width: int, rows: int, sms: int) -> list[Tile]:
    """Tiles for an elementwise kernel over rows: the widest power of two that wastes at most 5% of its lanes."""
    cols = 1024
    while cols > 64 and (cdiv(width, cols) * cols - width) * 20 > width:
        cols //= 2
    cols = min(cols, power_of_two(width))
    height = max(1, 2048 // cols)
    while height > 1 and cdiv(rows, height) * cdiv(width, cols) < sms:
        height //= 2
    return _around(Tile(height, cols, min(4, max(1, height * cols // 256))))


def _around(tile: Tile) -> list[Tile]:
    others = [Tile(tile.rows, tile.cols, warps) for warps in (tile.warps // 2, tile.warps * 2) if 1 <= warps <= 32] + [
        Tile(rows, tile.cols, tile.warps) for rows in (tile.rows // 2, tile.rows * 2) if 1 <= rows <= 64
    ]
    return [tile, *others]


# ---------------------------------------------------------------- tuning


def tuning_cache() -> Path:
    """The file that remembers tuned tiles: `$LUMINA_KERNELS_CACHE`, or a file in the user's cache folder."""
    chosen = os.environ.get("LUMINA_KERNELS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lumina" / "kernels.json"


_tuned: dict[str, Tile] = {}


def pick(
    name: str,
    tiles: list[Tile],
    build: Callable[[Tile], Launch],
    *,
    device: torch.device,
    timer: Callable[[Callable[[], None]], float] | None = None,
) -> Tile:
    """The tile to use: the table's first, or, with `LUMINA_KERNELS_AUTOTUNE=1` on a GPU, the fastest one measured.

    A measured choice is kept under `name`, the card and Triton's version in `tuning_cache()`; candidates run on the
    real arguments, so a kernel that overwrites its input must not be tuned this way. `timer` replaces the CUDA timer
    in tests.
    """
    if os.environ.get("LUMINA_KERNELS_AUTOTUNE") != "1" or (timer is None and device.type != "cuda"):
        return tiles[0]
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    key = f"{card}|triton {triton.__version__}|{name}"
    if key not in _tuned:
        path = tuning_cache()
        known: dict[str, Any] = {}
        if path.exists():
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                known = {}  # a torn file costs one new measurement, not the run
        if key in known:
            _tuned[key] = Tile(**known[key])
        else:
            _tuned[key] = min(tiles, key=lambda tile: (timer or milliseconds_of_launch)(build(tile)))
            known[key] = asdict(_tuned[key])
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")
            scratch.replace(path)
    return _tuned[key]


# ---------------------------------------------------------------- arguments


def check(*tensors: torch.Tensor | None) -> None:
    """Refuse tensors that a kernel cannot take: a wrong device (RuntimeError) or type (TypeError)."""
    present = [tensor for tensor in tensors if tensor is not None]
    for tensor in present:
        if tensor.device != present[0].device:
            raise RuntimeError(f"all tensors must be on one device, got {present[0].device} and {tensor.device}")
        if tensor.dtype not in FLOAT_TYPES:
            raise TypeError(f"expected bfloat16, float16 or float32, got {tensor.dtype}")
    if present[0].device.type not in ("cuda", "meta") and not INTERPRETED:
        raise RuntimeError(
            f"Lumina's Triton kernels need CUDA tensors, got {present[0].device}: use the plain torch path "
            "(LUMINA_KERNELS=torch) or, for tests, Triton's interpreter (LUMINA_KERNELS=interpret before the import)"
        )


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` [..., W] as [N, W] with unit stride along W: a view where one row stride describes it, else a copy."""
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    if x.dim() == 2 and (x.stride(1) == 1 or width == 1):
        return x
    if x.stride(-1) != 1 and width != 1:
        x = x.contiguous()
    try:
        return x.view(rows, width)
    except RuntimeError:  # leading dimensions that no single stride joins
        return x.contiguous().view(rows, width)


# ---------------------------------------------------------------- operators


def like(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of the shape and type of `x`, not filled, in half the host time of `x.new_empty(x.shape)`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def count_writes(*tensors: torch.Tensor) -> None:
    """Tell autograd that these tensors are overwritten; tensors made in inference mode keep no count."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    mutated: int = 0,
) -> Callable[..., Any]:
    """Register `lumina::NAME` from a schema string and return the operator.

    `fake` gives shapes and types without data, so that torch.compile and ZeRO-3 trace through; `setup` and `backward`
    are `torch.library.register_autograd`'s. Registered by schema and not through `custom_op`, whose wrapper costs
    more than a small kernel's launch.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    operator: torch._ops.OpOverload[..., Any] = getattr(torch.ops.lumina, name).default
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"lumina::{name}", fake, lib=_LIBRARY)
    if mutated:

        def count(keys: torch.DispatchKeySet, *args: Any) -> Any:
            torch.autograd.graph.increment_version(args[:mutated])
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return operator.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

        _LIBRARY.impl(name, count, "ADInplaceOrView", with_keyset=True)  # type: ignore[no-untyped-call]
    if backward is not None:
        torch.library.register_autograd(f"lumina::{name}", backward, setup_context=setup, lib=_LIBRARY)
    return operator
