"""Registration: what torch.compile, activation checkpointing and ZeRO-3 rely on, and how wrong calls are refused."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lumina import kernels

F32 = torch.float32


def normal(*size: int, grad: bool = True, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(size, dtype=dtype).requires_grad_(grad)


def rope_arguments(grad: bool = True) -> tuple[torch.Tensor, ...]:
    angles = torch.rand(7, 4)
    return normal(5, 4, 8, grad=grad), normal(5, 2, 8, grad=grad), angles.cos(), angles.sin(), torch.arange(5)


CALLS = {
    "rms_norm": lambda: (normal(3, 5, 24), normal(24), 1e-5),
    "rms_norm_backward": lambda: (
        normal(4, 24, grad=False),
        normal(4, 24, grad=False),
        normal(24, grad=False),
        None,
        1e-5,
    ),
    "add_rms_norm": lambda: (normal(4, 24), normal(4, 24), normal(24), 1e-5),
    "rope": lambda: (*rope_arguments(), False),
    "rope_": lambda: rope_arguments(grad=False),
    "swiglu": lambda: (normal(4, 24, dtype=torch.bfloat16),),
    "swiglu_backward": lambda: (normal(4, 12, grad=False), normal(4, 24, grad=False)),
    "cross_entropy_": lambda: (normal(4, 24, grad=False), torch.tensor([0, 23, -1, 5]), torch.ones(4)),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    # Poisoned memory would differ from itself under opcheck's comparisons: NaN is not NaN.
    torch.use_deterministic_algorithms(False)
    operator = getattr(torch.ops.lumina, name).default
    torch.library.opcheck(operator, CALLS[name]())


def test_every_operator_is_checked() -> None:
    defined = set()
    for name in ("rms_norm", "rope", "swiglu", "cross_entropy"):
        source = Path(importlib.import_module(f"lumina.kernels.{name}").__file__).read_text()
        defined |= set(re.findall(r'"(\w+)\(Tensor.*->', source))
    assert defined == set(CALLS)


def block(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    normed, total = kernels.add_rms_norm(x, residual, weight, 1e-5)
    return kernels.swiglu(normed) + total[..., : total.shape[-1] // 2]


def gradients(function: object, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(function(*arguments).square().sum(), arguments)


def test_activation_checkpointing_gives_the_same_bits() -> None:
    arguments = normal(6, 32), normal(6, 32), normal(32)
    plain = gradients(block, *arguments)
    recomputed = gradients(lambda *a: checkpoint(block, *a, use_reentrant=False), *arguments)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_compiled_without_a_graph_break() -> None:
    arguments = normal(6, 32), normal(6, 32), normal(32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(block, *arguments), gradients(compiled, *arguments), strict=True):
        torch.testing.assert_close(a, b)


def test_in_place_operators_count_versions() -> None:
    """Called as operators; without the dispatcher: test_plans.py."""
    logits = normal(2, 9, grad=False)
    torch.ops.lumina.cross_entropy_(logits, torch.tensor([0, 1]), torch.ones(2))
    assert logits._version == 1
    q, k, *others = rope_arguments(grad=False)
    torch.ops.lumina.rope_(q, k, *others)
    assert (q._version, k._version) == (1, 1)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="weight must have shape"):
        kernels.rms_norm(torch.ones(2, 8), torch.ones(7), 1e-5)
    with pytest.raises(ValueError, match="residual must match"):
        kernels.add_rms_norm(torch.ones(2, 8), torch.ones(2, 8).bfloat16(), torch.ones(8), 1e-5)
    with pytest.raises(TypeError, match="float64"):
        kernels.rms_norm(torch.ones(2, 8).double(), torch.ones(8).double(), 1e-5)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process without the interpreter's variables."""
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LUMINA_KERNELS")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean | environment)


def test_cpu_tensors_without_the_interpreter_are_refused_with_the_remedy() -> None:
    run = python("import torch; from lumina import kernels; kernels.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5)")
    assert run.returncode
    assert "LUMINA_KERNELS=torch" in run.stderr


def test_import_without_triton() -> None:
    run = python(
        """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
import torch
from lumina import kernels
assert not kernels.AVAILABLE
print(kernels.reference.swiglu(torch.ones(1, 2)).shape)
try:
    kernels.rms_norm
except ImportError as error:
    print(error)
"""
    )
    assert run.returncode == 0, run.stderr
    assert "torch.Size([1, 1])" in run.stdout
    assert "pip install triton" in run.stdout


def test_environment_is_chosen_before_triton() -> None:
    run = python(
        "from lumina import kernels; from lumina.kernels import launch; import os;"
        "print(launch.INTERPRETED, os.environ['TRITON_DEFAULT_FP_FUSION'])",
        LUMINA_KERNELS="interpret",
    )
    assert run.stdout.split() == ["True", "1"], run.stderr
