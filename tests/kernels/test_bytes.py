"""Bytes moved, counted at every load and store of the interpreter, against the formula and the limit."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from lumina.kernels import launch
from lumina.kernels.benchmark import Case, Shape
from lumina.kernels.cases import LIMITS, PRESETS
from lumina.kernels.launch import Launch
from triton.runtime import interpreter

#: Arguments that many programs read out of L2: counted once, however often they are asked for.
TABLES = {"weight_ptr", "cos_ptr", "sin_ptr"}


class Count:
    """Bytes asked for and distinct bytes, loaded and stored, by the name of the pointer argument."""

    def __init__(self, run: Launch) -> None:
        names = dict(zip(run.kernel.arg_names, run.args, strict=False))
        self.ranges = {
            name: (t.untyped_storage().data_ptr(), t.untyped_storage().nbytes(), t.element_size())
            for name, t in names.items()
            if isinstance(t, torch.Tensor)
        }
        self.addresses: dict[str, dict[str, list[np.ndarray]]] = {
            kind: {name: [] for name in self.ranges} for kind in ("load", "store")
        }

    def add(self, kind: str, pointers: np.ndarray, mask: np.ndarray) -> None:
        addresses = np.broadcast_to(pointers, mask.shape)[mask].ravel() if mask.size > 1 else pointers.ravel()
        if mask.size == 1 and not mask.all():
            return
        for name, (start, size, _) in self.ranges.items():
            if len(addresses) and start <= addresses[0] < start + size:
                self.addresses[kind][name].append(addresses)
                return
        assert not len(addresses), "an access to no argument"

    def asked(self, kind: str, name: str) -> int:
        return sum(map(len, self.addresses[kind][name])) * self.ranges[name][2]

    def distinct(self, kind: str, name: str) -> int:
        found = self.addresses[kind][name]
        return len(np.unique(np.concatenate(found))) * self.ranges[name][2] if found else 0


@contextmanager
def counting(run: Launch) -> Iterator[Count]:
    builder, count = interpreter.InterpreterBuilder, Count(run)
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, pointers, mask, *rest):
        count.add("load", pointers.data, mask.data)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        count.add("store", pointers.data, mask.data)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield count
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def moved(case: Case) -> tuple[int, int]:
    """(bytes that the interpreted launches moved, bytes by the formula)."""
    launches = case.launches("cpu")
    total = 0
    for run in launches:
        for tensor in run.args:
            if isinstance(tensor, torch.Tensor):
                # Every position of the tables, targets in range, no row without weight.
                tensor.copy_(1 if tensor.is_floating_point() else torch.arange(tensor.numel()).view(tensor.shape) % 3)
        two_sweeps = run.kernel.fn.__name__ in ("_cross_entropy", "_forward_wide", "_backward_wide")
        with counting(run) as count:
            run()
        for name in count.ranges:
            loads = count.distinct if name in TABLES or two_sweeps else count.asked
            total += loads("load", name) + count.asked("store", name)
    return total, case.bytes(launches)


SMALL = (
    Shape("ragged", 96, 136, 4, 2, 16, 300, tokens=37, sequence=3),
    Shape("grouped", 128, 192, 12, 4, 8, 4096, tokens=64, sequence=3),
)
#: Past what one program holds: the two-sweep norms.
WIDE = Shape("wide", 9000, 64, 2, 1, 8, 300, tokens=3, sequence=3)


@pytest.mark.parametrize("shape", SMALL, ids=lambda s: s.name)
@pytest.mark.parametrize(("op", "direction"), LIMITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_formula_is_what_the_kernels_do(op: str, direction: str, shape: Shape, dtype: torch.dtype) -> None:
    counted, formula = moved(Case(op, direction, shape, dtype))
    assert counted == formula


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_the_formula_of_wide_norms(op: str) -> None:
    counted, formula = moved(Case(op, "backward", WIDE, torch.bfloat16))
    assert counted == formula


def test_second_sweep_is_one_sweep() -> None:
    """Cross entropy asks for its row twice and for the target once more: what is said to hit L2 is just that."""
    case = Case("cross_entropy", "both", SMALL[0], torch.bfloat16)
    (run,) = case.launches("cpu")
    for tensor in run.args[:4]:
        tensor.copy_(torch.ones(tensor.shape))
    with counting(run) as count:
        run()
    assert count.asked("load", "logits_ptr") == (2 * case.elements + case.rows) * 2
    assert count.asked("store", "logits_ptr") == case.elements * 2


@pytest.mark.parametrize("shape", PRESETS, ids=lambda s: s.name)
@pytest.mark.parametrize(("op", "direction"), LIMITS)
@pytest.mark.parametrize("sms", [108, 132, 148])
def test_presets_stay_within_five_percent_of_the_limit(op: str, direction: str, shape: Shape, sms: int) -> None:
    case = Case(op, direction, shape, torch.bfloat16)
    with launch.planned_for(sms):
        launches = case.launches()
    assert case.limit <= case.bytes(launches) <= 1.05 * case.limit


def test_limits_are_those_of_the_operations() -> None:
    """Bytes per element in bf16: each input read once, each output written once."""
    in_bf16 = {key: 2 * elements for key, elements in LIMITS.items()}
    assert in_bf16 == {
        ("rms_norm", "forward"): 4,
        ("rms_norm", "backward"): 6,
        ("add_rms_norm", "forward"): 8,
        ("add_rms_norm", "backward"): 8,
        ("rope", "forward"): 4,
        ("rope", "backward"): 4,
        ("swiglu", "forward"): 6,
        ("swiglu", "backward"): 10,
        ("cross_entropy", "both"): 4,
    }


def test_the_shapes_are_the_presets() -> None:
    config = pytest.importorskip("lumina.config")
    for shape in PRESETS:
        preset = config.load(shape.name, {}, [])
        widths = preset.hidden_size, preset.ffn_size, preset.num_heads, preset.num_kv_heads, preset.head_dim
        assert (shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.head_dim) == widths
        assert (shape.sequence, shape.vocabulary) == (preset.seq_length, preset.vocab_size)
