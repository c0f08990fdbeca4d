"""Launch plans and calls without the dispatcher: the same kernels, the same arguments, the same gradients.

Nothing is compiled in Triton's interpreter, so nothing is planned in it: those tests start a process in which Triton
compiles for an H100 and hands its launches to a driver that does nothing (benchmarks/null_cuda.c).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lumina.kernels import plans
from torch.utils._python_dispatch import TorchDispatchMode

from lumina import kernels

ROOT = Path(__file__).parents[2]


def normal(*size: int) -> torch.Tensor:
    return torch.randn(size, requires_grad=True)


def add_norm() -> tuple[object, tuple[torch.Tensor, ...]]:
    return lambda x, r, w: kernels.add_rms_norm(x, r, w, 1e-5), (normal(2, 3, 24), normal(2, 3, 24), normal(24))


def rope() -> tuple[object, tuple[torch.Tensor, ...]]:
    angles = torch.rand(5, 4)
    turn = lambda q, k: kernels.rope(q, k, angles.cos(), angles.sin(), torch.arange(5))
    return turn, (normal(5, 4, 8), normal(5, 2, 8))


CALLS = {
    "rms_norm": lambda: (lambda x, w: kernels.rms_norm(x, w, 1e-5), (normal(4, 24), normal(24))),
    "add_rms_norm": add_norm,
    "rope": rope,
    "swiglu": lambda: (kernels.swiglu, (normal(4, 24),)),
}


class Seen(TorchDispatchMode):
    """Notes what the dispatcher sees; while it listens, operators are called as operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def outputs_and_gradients(function: object, arguments: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    out = function(*arguments)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [torch.linspace(-1, 1, o.numel()).view(o.shape) for o in out]
    return [*(o.detach() for o in out), *torch.autograd.grad(out, arguments, upstream)]


@pytest.mark.parametrize("name", CALLS)
def test_without_the_dispatcher_the_same_bits(name: str) -> None:
    function, arguments = CALLS[name]()
    assert plans.direct(*arguments)
    with Seen() as quiet:
        assert not plans.direct(*arguments)
        dispatched = outputs_and_gradients(function, arguments)
    assert f"lumina.{name}.default" in quiet.names
    for a, b in zip(outputs_and_gradients(function, arguments), dispatched, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        out = function(*arguments)
        assert torch.equal(out[0] if isinstance(out, tuple) else out, dispatched[0])


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused_not_wrong(name: str) -> None:
    function, arguments = CALLS[name]()
    out = function(*arguments)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [torch.ones_like(o, requires_grad=True) for o in out]
    first = torch.autograd.grad(out, arguments[0], upstream, create_graph=True)[0]
    # rope is linear: what is left is a function of the incoming gradient, and that one it can follow.
    if name == "rope":
        assert torch.autograd.grad(first.sum(), upstream[0])[0].isfinite().all()
        return
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), arguments[0])


def test_who_must_see_an_operator_does() -> None:
    x = torch.ones(2, 4)
    assert plans.direct(x)
    assert not plans.direct(x.to("meta"))
    assert not plans.direct(x, x.as_subclass(type("Subclass", (torch.Tensor,), {})))
    seen = []
    torch.func.functionalize(lambda t: seen.append(plans.direct(t)) or t)(x)
    assert seen == [False]


def test_in_place_without_the_dispatcher_counts_versions() -> None:
    logits = torch.randn(2, 9)
    assert plans.direct(logits)
    kernels.cross_entropy_(logits, torch.tensor([0, 1]), torch.ones(2))
    assert logits._version == 1
    angles, (q, k) = torch.rand(5, 4), (torch.randn(5, 4, 8), torch.randn(5, 2, 8))
    kernels.rope_(q, k, angles.cos(), angles.sin(), torch.arange(5))
    assert (q._version, k._version) == (1, 1)
    with torch.inference_mode():  # which keeps no versions
        kernels.cross_entropy_(torch.randn(2, 9), torch.tensor([0, 1]), torch.ones(2))


#: Every operator forward and backward, three times: the long way, planned, and on addresses that are not aligned. Each
#: launch is noted with its addresses named by their place in the call, so that it does not matter what they are.
RECORD = """
import json, sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import host_time
import torch
with tempfile.TemporaryDirectory() as folder:
    cuda = host_time.null_driver(Path(folder))
    from triton.backends.nvidia import driver
    from lumina import kernels
    from lumina.kernels import launch, plans
    launch.INTERPRETED = True

    noted, call = [], driver.CudaLauncher.__call__

    def note(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        pointers = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
        noted.append([[x, y, z], id(self), pointers])
        return call(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args)

    driver.CudaLauncher.__call__ = note

    def run(operator, inputs):
        del noted[:]
        before = cuda.null_cuda_launches()
        out = operator(*inputs)
        launched = cuda.null_cuda_launches() - before
        known = {t.data_ptr(): f"input {i}" for i, t in enumerate(inputs) if isinstance(t, torch.Tensor)}
        found = []
        for grid, kernel, args in noted:
            names = [known.setdefault(a, f"made {len(known)}") if isinstance(a, int) and a > 2**32 else a for a in args]
            found.append([grid, kernel, names])
        return [found, launched]

    def moved(tensor):  # the same values four bytes further on
        store = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return store[1:].view(tensor.shape).copy_(tensor)

    L = torch.ops.lumina
    x, w, s = torch.randn(3, 8, 64), torch.ones(64), torch.randn(3, 8, 64)
    q, k, a = torch.randn(1, 8, 4, 16), torch.randn(1, 8, 2, 16), torch.rand(8, 8)
    p, wide = torch.arange(8)[None], torch.randn(4, 9000)
    calls = {
        "rms_norm": (L.rms_norm, (x, w, 1e-5)),
        "add_rms_norm": (L.add_rms_norm, (x, s, w, 1e-5)),
        "rms_norm_backward": (L.rms_norm_backward, (s, x, w, None, 1e-5)),
        "add_rms_norm_backward": (L.rms_norm_backward, (s, x, w, x + 1, 1e-5)),
        "wide_backward": (L.rms_norm_backward, (wide, wide + 1, torch.ones(9000), None, 1e-5)),
        "swiglu": (L.swiglu, (x,)),
        "swiglu_backward": (L.swiglu_backward, (torch.randn(3, 8, 32), x)),
        "rope": (L.rope, (q, k, a.cos(), a.sin(), p, False)),
        "rope_inverse": (L.rope, (q, k, a.cos(), a.sin(), p, True)),
        "rope_": (L.rope_, (q, k, a.cos(), a.sin(), p)),
        "cross_entropy_": (L.cross_entropy_, (torch.randn(8, 96), torch.arange(8), torch.ones(8))),
    }
    report = {}
    for name, (operator, inputs) in calls.items():
        again = [t + 0 if isinstance(t, torch.Tensor) else t for t in inputs]
        report[name] = [run(operator, inputs), run(operator, again), run(operator, [moved(inputs[0]), *inputs[1:]])]
    # Aliases: a plan must not take two arguments for one because they were one when it was made.
    t, u = torch.randn(4, 64), torch.randn(4, 64)
    run(L.add_rms_norm, (t, t, w, 1e-5))
    report["aliases"] = run(L.add_rms_norm, (t, u, w, 1e-5))
    # A copy is made on each call; a profiler's hook is called by planned launches too.
    flat = torch.randn(64, 4).T
    report["copied"] = [run(L.rms_norm, (flat, w, 1e-5))[1] for _ in range(2)]
    import triton
    hooked = []
    triton.knobs.runtime.launch_enter_hook = lambda metadata: hooked.append(metadata.get()["name"])
    run(L.swiglu, (x,))
    report["hooked"] = list(hooked)
    plans.MOST_PLANS = 5
    from lumina.kernels.swiglu import _FORWARD as kept
    for rows in range(1, 20):
        L.swiglu(torch.randn(rows, 64))
    report["kept"] = len(kept)
    print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def recorded() -> dict[str, object]:
    """What Triton's launcher was given."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here to build the null driver and Triton's launcher")
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LUMINA_KERNELS")}
    ended = subprocess.run(
        [sys.executable, "-c", RECORD, str(ROOT / "benchmarks")], capture_output=True, text=True, env=clean
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


OPERATORS = (
    "rms_norm", "add_rms_norm", "rms_norm_backward", "add_rms_norm_backward", "wide_backward", "swiglu",
    "swiglu_backward", "rope", "rope_inverse", "rope_", "cross_entropy_",
)  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_a_planned_launch_is_tritons_own(recorded: dict[str, object], name: str) -> None:
    (long, launches), (planned, again), (moved, _) = recorded[name]
    assert launches == again == len(long) > 0
    assert planned == long
    # Other addresses, other code: the kernel compiled for aligned ones was not taken.
    assert moved[0][1] != long[0][1]
    assert [step[0] for step in moved] == [step[0] for step in long]


def test_aliases_are_told_apart(recorded: dict[str, object]) -> None:
    ((_, _, arguments),), _ = recorded["aliases"]
    assert arguments[:2] == ["input 0", "input 1"]


def test_copies_and_hooks_go_on(recorded: dict[str, object]) -> None:
    assert recorded["copied"] == [1, 1]
    assert recorded["hooked"] == ["_forward"]


def test_plans_do_not_grow_for_ever(recorded: dict[str, object]) -> None:
    assert 0 < recorded["kept"] <= 5
